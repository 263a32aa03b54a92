"""The tower and the resampler of ERNIE 4.5 VL: fields of config.json, and where their weights lie.

Source: transformers 5.24 `models/ernie4_5_vl_moe`, and its renamings of what is published (`conversion_mapping.py`).
"""

from moevlm.export.config import MLPConfig, ResampledVisionConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import axial_theta
from moevlm.export.families.sources import both_halves

_TOWER, _RESAMPLER = "model.vision_model.", "model.resampler_model."
_BLOCK = f"{_TOWER}blocks.{{i}}."
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def ernie_tower(vision: Fields, out: int, out_epsilon: float) -> ResampledVisionConfig:
    """The tower of config.json's vision_config. out, out_epsilon: width and epsilon of the decoder."""
    vision.choice("temporal_merge_size", (2,), 2)
    vision.get("tie_word_embeddings", None)
    hidden, heads = vision.positive("hidden_size"), vision.aliased("num_heads", "num_attention_heads")
    return ResampledVisionConfig(
        hidden=hidden,
        depth=vision.aliased("depth", "num_hidden_layers"),
        heads=heads,
        head_dim=hidden // heads,
        mlp=MLPConfig(
            vision.positive("intermediate_size", 5120),
            vision.choice("hidden_act", _ACTIVATIONS, "quick_gelu"),
            gated=False,
        ),
        epsilon=vision.number("rms_norm_eps", 1e-6),
        patch_size=vision.positive("patch_size", 14),
        merge_size=vision.positive("spatial_merge_size", 2),
        channels=vision.positive("in_channels", 3),
        rope_theta=axial_theta(vision),
        out=out,
        out_epsilon=out_epsilon,
    )


def ernie_vision_weights() -> shared.Weights:
    """By canonical names. An image is one frame, which the resampler takes twice."""
    resampler = {
        f"vision.{ours}.{part}": f"{_RESAMPLER}{ours}_linear.{number}"
        for ours in ("spatial", "temporal")
        for part, number in (("up", 0), ("down", 2), ("norm", 3))
    }
    modules = {
        "vision.blocks.{i}.attention_norm": f"{_BLOCK}norm1",
        "vision.blocks.{i}.mlp_norm": f"{_BLOCK}norm2",
        "vision.blocks.{i}.attention.qkv": f"{_BLOCK}attn.qkv",
        "vision.blocks.{i}.attention.out": f"{_BLOCK}attn.proj",
        "vision.blocks.{i}.mlp.up": f"{_BLOCK}mlp.fc1",
        "vision.blocks.{i}.mlp.down": f"{_BLOCK}mlp.fc2",
        "vision.last_norm": f"{_TOWER}ln",
        "vision.projection": f"{_RESAMPLER}mlp",
        **resampler,
    }
    return {
        **shared.renamed(modules, shared.BOTH),
        **shared.renamed(
            {"vision.patch_embedding": f"{_TOWER}patch_embed.proj", "vision.out_norm": f"{_RESAMPLER}after_norm"}
        ),
        "vision.temporal.up.weight": both_halves(f"{_RESAMPLER}temporal_linear.0.weight"),
    }
