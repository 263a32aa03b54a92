"""OpenVINO and its exporter, and the decoder alone for it: Qwen3-VL-MoE is not among the models that it exports."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.peers.environment import PEERS, new_environment, run

PACKAGES = ("openvino==2026.4.1", "optimum-intel[openvino]==2.2.0", "torch==2.13.0")
FOLDER = PEERS / "openvino"
PYTHON = FOLDER / "venv/bin/python"
FORMATS = {4: ["int4", "--group-size", "128", "--ratio", "1.0", "--sym", "--all-layers"], 8: ["int8"]}


def set_up() -> None:
    """The environment, once. Raises PeerError."""
    done = FOLDER / "done"
    if done.exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "setup.log"
    new_environment(PYTHON, log)
    run([PYTHON, "-m", "pip", "install", *PACKAGES], log)
    # Not needed for text, and with a torch of another build it breaks the import of every model.
    run([PYTHON, "-m", "pip", "uninstall", "--yes", "torchvision"], log)
    done.touch()


def prepare(checkpoint: Path, bits: Sequence[int]) -> None:
    """Write the decoder as Qwen3-MoE, then export it, where that was not done (9 GB of memory). Raises PeerError."""
    for width in bits:
        target = model_of(checkpoint, width).parent
        if target.exists():
            continue
        decoder, log = checkpoint.with_suffix(".qwen3_moe"), FOLDER / "export.log"
        if not decoder.exists():
            run([sys.executable, "-m", "bench.peers.openvino_setup", checkpoint, decoder], log)
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        export = [PYTHON.with_name("optimum-cli"), "export", "openvino", "--model", decoder]
        options = ["--task", "text-generation-with-past", "--disable-convert-tokenizer"]
        run([*export, *options, "--weight-format", *FORMATS[width], partial], log)
        partial.rename(target)


def model_of(checkpoint: Path, bits: int) -> Path:
    """The exported graph with weights of so many bits."""
    return checkpoint.with_suffix(f".openvino-int{bits}") / "openvino_model.xml"


def write_decoder(checkpoint: Path, destination: Path) -> None:
    """The text part of a Qwen3-VL-MoE checkpoint as a Qwen3MoeForCausalLM one: renamed, experts one by one."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    partial = destination.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    rope = {"rope_type": "default", "rope_theta": text["rope_parameters"]["rope_theta"]}
    names = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
    rest = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False}
    (partial / "config.json").write_text(json.dumps({**text, **names, **rest, "rope_parameters": rope}, indent=1))
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118 - not a dictionary
                if ".visual." not in name:
                    tensors |= _renamed(name.replace("model.language_model.", "model."), source.get_tensor(name))
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(destination)


def _renamed(name: str, tensor) -> dict:
    """Fused experts [E, H, 2I] and [E, I, H] become matrices [out, in] of one expert each; all else stays."""
    prefix, _, kind = name.rpartition(".")
    if kind == "gate_up_proj":
        parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=-1), strict=True))
    elif kind == "down_proj":
        parts = {"down_proj": tensor}
    else:
        return {name: tensor}
    return {
        f"{prefix}.{i}.{part}.weight": matrix.t().contiguous()
        for part, fused in parts.items()
        for i, matrix in enumerate(fused)
    }


if __name__ == "__main__":
    write_decoder(Path(sys.argv[1]), Path(sys.argv[2]))
