"""A random Qwen3-VL-MoE checkpoint of any size, streamed to disk: something to measure exports and engines on.

python bench/random_checkpoint.py CHECKPOINT [--layers 12] [--hidden 1024] [--experts 64] ...
"""

import json
from pathlib import Path

import click
import ml_dtypes
import numpy as np
from rich.progress import track

from moevlm.runtime.bundle.safetensors import header_of
from moevlm.runtime.core.dtypes import DTYPES

SHARD_BYTES = 4 << 30
PIECE = 4 << 20  # elements drawn at a time


def config(layers: int, hidden: int, experts: int, top_k: int, width: int, vocabulary: int) -> dict[str, object]:
    """A config.json with heads of 128 (16 to 4 key-value heads at hidden 1024) and a vision tower of 6 x 512."""
    text = {
        "model_type": "qwen3_vl_moe_text",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "vocab_size": vocabulary,
        "eos_token_id": vocabulary - 5,
        "max_position_embeddings": 262144,  # as published
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "model_type": "qwen3_vl_moe_vision",
        "hidden_act": "gelu_pytorch_tanh",
        "depth": 6,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_heads": 8,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 3, 5],
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {name: vocabulary - 1 - i for i, name in enumerate(names)}
    names = {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    return {**names, "text_config": text, "vision_config": vision, **tokens}


def preprocessor(config: dict[str, dict[str, int]]) -> dict[str, object]:
    """A preprocessor_config.json with the published models' limits: images of 256 x 256 to 4096 x 4096 pixels."""
    vision = config["vision_config"]
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 256**2, "longest_edge": 4096**2},
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def shapes(config: dict[str, dict[str, int]]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, fused experts as the hub stores them: [E, H, 2I] and [E, I, H]."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, size = text["hidden_size"], text["head_dim"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    experts, width = text["num_experts"], text["moe_intermediate_size"]
    result = {"lm_head.weight": (text["vocab_size"], hidden)}
    model = "model.language_model."
    result |= {f"{model}embed_tokens.weight": (text["vocab_size"], hidden), f"{model}norm.weight": (hidden,)}
    for i in range(text["num_hidden_layers"]):
        layer = f"{model}layers.{i}."
        result |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}self_attn.q_proj.weight": (heads * size, hidden),
            f"{layer}self_attn.k_proj.weight": (kv * size, hidden),
            f"{layer}self_attn.v_proj.weight": (kv * size, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, heads * size),
            f"{layer}self_attn.q_norm.weight": (size,),
            f"{layer}self_attn.k_norm.weight": (size,),
            f"{layer}mlp.gate.weight": (experts, hidden),
            f"{layer}mlp.experts.gate_up_proj": (experts, hidden, 2 * width),
            f"{layer}mlp.experts.down_proj": (experts, width, hidden),
        }
    h, inner = vision["hidden_size"], vision["intermediate_size"]
    joined, out, patch = 4 * h, vision["out_hidden_size"], vision["patch_size"]
    visual = "model.visual."
    block = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.linear_fc1": (inner, h), "mlp.linear_fc2": (h, inner)}
    block |= {"norm1": (h,), "norm2": (h,)}
    linear = {f"{visual}blocks.{i}.{name}": s for i in range(vision["depth"]) for name, s in block.items()}
    linear[f"{visual}patch_embed.proj"] = (h, 3, 2, patch, patch)
    mergers = {f"{visual}merger": h} | {f"{visual}deepstack_merger_list.{i}": joined for i in range(3)}
    for name, normed in mergers.items():
        linear |= {f"{name}.norm": (normed,), f"{name}.linear_fc1": (joined, joined)}
        linear[f"{name}.linear_fc2"] = (out, joined)
    for name, shape in linear.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result | {f"{visual}pos_embed.weight": (vision["num_position_embeddings"], h)}


def write(directory: Path, config: dict[str, dict[str, int]], seed: int = 0) -> int:
    """Write both configurations and bf16 shards; returns the bytes of these. Matrices have a variance of 1 / fan-in."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor(config), indent=1))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes(config).items():
        size = 2 * int(np.prod(shape))
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    rng, index, total = np.random.default_rng(seed), {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(shard, file)
        total += _write_shard(directory / file, shard, rng)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    return total


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], rng: np.random.Generator) -> int:
    with path.open("wb") as file:
        file.write(header_of({name: (DTYPES["bfloat16"], shape) for name, shape in shard.items()}, 8))
        for name, shape in track(shard.items(), description=path.name):
            scale = _scale(name, shape)
            count = int(np.prod(shape))
            for start in range(0, count, PIECE):
                piece = rng.standard_normal(min(PIECE, count - start), np.float32) * scale
                file.write((piece + (len(shape) == 1)).astype(ml_dtypes.bfloat16).tobytes())
    return sum(2 * int(np.prod(shape)) for shape in shard.values())


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a tensor's elements."""
    if name.endswith("embed_tokens.weight"):
        # Larger than what the layers add: else tokens grow alike, and most of them choose the same few experts.
        return 4.0
    if len(shape) == 1:
        return 0.02
    return float(np.prod(shape[-2:-1] if len(shape) == 3 else shape[1:])) ** -0.5


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--layers", default=12, show_default=True)
@click.option("--hidden", default=1024, show_default=True)
@click.option("--experts", default=64, show_default=True)
@click.option("--top-k", default=8, show_default=True)
@click.option("--width", default=384, show_default=True, help="Of one expert.")
@click.option("--vocabulary", default=32000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    checkpoint: Path, layers: int, hidden: int, experts: int, top_k: int, width: int, vocabulary: int, seed: int
) -> None:
    """Write a random checkpoint to CHECKPOINT."""
    size = write(checkpoint, config(layers, hidden, experts, top_k, width, vocabulary), seed)
    click.echo(f"{checkpoint}: {size / 1e9:.2f} GB, {size / 2e9:.2f} B parameters")


if __name__ == "__main__":
    main()
