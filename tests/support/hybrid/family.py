"""config.json of the test family as a canonical config, and where its weights lie."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch

from moevlm.export.config import (
    DecoderConfig,
    GQAConfig,
    GridVisionConfig,
    LayerConfig,
    MergerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from moevlm.export.families.base import Family
from moevlm.export.families.fields import Fields
from moevlm.export.families.sources import Source, plus_one
from moevlm.export.modules.vision import vision_tower
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import QueryScaleMetadata, RopeMetadata
from tests.support.hybrid.mixer import RecurrenceConfig

HIDDEN, CHANNELS = 32, 48
EPSILON = 1e-6
VISION = GridVisionConfig(
    hidden=16,
    depth=1,
    heads=2,
    head_dim=8,
    mlp=MLPConfig(24, "gelu_tanh", gated=False),
    norm="layer",
    epsilon=1e-6,
    qkv_bias=True,
    out_bias=True,
    outer_norms=False,
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    channels=3,
    position_grid=5,
    position_resampling="bilinear",
    rope_theta=1e4,
    out=HIDDEN,
    merger=MergerConfig("mlp", width=64),
)
# Attention to all tokens, a recurrence, attention in a window with everything that the first has not, and so on.
WIDE = GQAConfig(heads=4, kv_heads=2, head_dim=16, rotary_dim=16, rope=0, qk_norm=True, qkv_bias=False, out_bias=False)
LOCAL = GQAConfig(
    heads=2,
    kv_heads=1,
    head_dim=32,
    value_dim=24,
    rotary_dim=16,
    rope=1,
    qk_norm=False,
    qkv_bias=True,
    out_bias=True,
    window=16,
    softcap=4.0,
    sinks=True,
    scale=0.25,
)
# What targets without softcap and sinks have of it.
WINDOWED = replace(LOCAL, softcap=0.0, sinks=False)
IMAGES = replace(WINDOWED, value_dim=0, value_is_key=True, value_norm=True, bidirectional_images=True)
# No rotation; and with queries that grow with their place.
UNTURNED = replace(WINDOWED, rotary_dim=0, window=0)
SCALED = replace(UNTURNED, query_scale=True)
# One latent for all heads.
LATENT = MLAConfig(
    heads=4, q_rank=24, kv_rank=32, nope_dim=8, rope_dim=16, value_dim=12, bias=True, rope=1, query_scale=True
)
QUERY_SCALE = QueryScaleMetadata(beta=0.5, original=8, offset=1)
ROPES = (
    RopeMetadata(dim=16, theta=1e4, sections=(8, 0, 0), interleaved=False),
    RopeMetadata(dim=16, theta=500.0, sections=(8, 0, 0), interleaved=False),
)
DENSE = MLPConfig(40, "silu")
SPARSE = MoEConfig(8, 24, RouterSpec(top_k=2), ExpertsSpec())
# Biases everywhere (gpt-oss); the limit clamps some values.
BIASED = MoEConfig(
    8,
    24,
    RouterSpec(top_k=2, scoring="softmax_after_topk", renormalize=False),
    ExpertsSpec("swiglu_clamped", limit=0.75),
    router_bias=True,
    expert_biases=True,
)
LAYERS = {
    "wide": LayerConfig(WIDE, SPARSE),
    "local": LayerConfig(LOCAL, SPARSE),
    "windowed": LayerConfig(WINDOWED, SPARSE),
    "unturned": LayerConfig(UNTURNED, BIASED),
    "scaled": LayerConfig(SCALED, BIASED),
    "latent": LayerConfig(LATENT, SPARSE),
    "recurrent": LayerConfig(RecurrenceConfig(CHANNELS), DENSE),
    "sandwich": LayerConfig(LOCAL, SPARSE, norms="sandwich"),
    "windowed sandwich": LayerConfig(WINDOWED, SPARSE, norms="sandwich"),
    "parallel": LayerConfig(WIDE, DENSE, norms="parallel"),
    "images": LayerConfig(IMAGES, replace(SPARSE, expert_scale=True)),
}

_LAYER = "model.layers.{i}."
_ATTENTION = ("q", "k", "v", "out", "q_norm", "k_norm")


def _vision_names() -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in vision_tower(VISION).named_parameters()]


class Hybrid(Family):
    """See the module's docstring."""

    router_suffix = "router"

    def translate(self, fields: Fields) -> ModelConfig:
        layers = tuple(LAYERS[kind] for kind in fields["layers"])
        scaled = any(layer.mixer.scales_queries for layer in layers)
        return ModelConfig(
            model_type="hybrid_test",
            decoder=DecoderConfig(
                vocabulary=fields.positive("vocab_size"),
                hidden=HIDDEN,
                context=fields.positive("max_position_embeddings"),
                epsilon=EPSILON,
                tied_head=False,
                ropes=ROPES,
                layers=layers,
                query_scale=QUERY_SCALE if scaled else None,
            ),
            vision=VISION,
            image_token_id=fields.count("image_token_id"),
            eos_token_ids=fields.ids("eos_token_id", ()),
        )

    weights: ClassVar[Mapping[str, str | Source]] = {
        "decoder.embedding": "model.embedding",
        "decoder.head": "model.head",
        "decoder.norm.weight": "model.norm.weight",
        **{
            f"decoder.layers.{{i}}.{name}": _LAYER + name
            for name in (
                *(f"attention.{part}.{kind}" for part in _ATTENTION for kind in ("weight", "bias")),
                "attention.sinks",
                *(f"attention.{part}.{kind}" for part in ("q_down", "kv_down") for kind in ("weight", "bias")),
                *(f"attention.{part}.weight" for part in ("q_up", "kv_norm")),
                "attention.key_up",
                "attention.value_up",
                *(f"attention.{part}.weight" for part in ("inner", "gate")),
                "attention.decay",
                "attention_norm.weight",
                "feed_forward_norm.weight",
                *(f"feed_forward.{part}.weight" for part in ("router", "gate", "up", "down")),
                "feed_forward.router.bias",
                *(f"feed_forward.{part}{kind}" for part in ("gate_up", "down") for kind in ("", "_bias")),
                "feed_forward.expert_scale",
            )
        },
        **{
            f"decoder.layers.{{i}}.{name}.weight": plus_one(f"{_LAYER}{name}.weight")
            for name in ("attention_post_norm", "feed_forward_post_norm")
        },
        **{f"vision.{name}": f"vision.{name}" for name in _vision_names()},
    }
