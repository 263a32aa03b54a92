"""Random checkpoints of the test family."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from moevlm.export.modules.decoder import Decoder
from moevlm.export.modules.vision import vision_tower
from tests.support.families import TINY
from tests.support.families.base import END, IMAGE, STOP, VOCABULARY
from tests.support.hybrid.family import Hybrid
from tests.support.tiny import write_side_files

LAYERS = ("wide", "recurrent", "local", "recurrent", "sandwich", "parallel", "scaled", "latent")
_PREPROCESSOR = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def save(directory: Path, layers: tuple[str, ...] = LAYERS, seed: int = 0) -> Path:
    """A checkpoint with tokenizer, chat template and preprocessor. layers: kinds, see `family.LAYERS`."""
    config = {
        "model_type": "hybrid_test",
        "layers": layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "image_token_id": IMAGE,
        "eos_token_id": [STOP, END],
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    canonical = Hybrid().config(config)
    with torch.device("meta"):
        towers = {"model": Decoder(canonical.decoder), "vision": vision_tower(canonical.vision)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for tower, module in towers.items():
        for name, parameter in module.named_parameters():
            tensors[f"{tower}.{name}"] = _random(name, tuple(parameter.shape), generator)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    write_side_files(directory, _PREPROCESSOR, TINY["qwen3_vl_moe"])
    return directory


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values that keep activations near 1, and what a sequence keeps for some ten tokens."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("decay"):
        return torch.sigmoid(2 + values)
    if "post_norm" in name:  # stored as the difference from 1
        return 0.2 * values
    if "norm" in name:
        return 1 + 0.2 * values if name.endswith("weight") else 0.2 * values
    if name.endswith("sinks") or name == "embedding":
        return values
    if len(shape) < 2 or name.endswith("_bias"):
        return 0.2 * values
    return values / shape[-1] ** 0.5
