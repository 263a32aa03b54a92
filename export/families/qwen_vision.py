"""The vision tower of Qwen3-VL, Qwen3.5 and Qwen3-Omni: where its weights lie, and its fields of config.json."""

import math

from moevlm.export.config import GridVisionConfig, MergerConfig, MLPConfig
from moevlm.export.families import shared
from moevlm.export.families.convolutions import flattened
from moevlm.export.families.fields import Fields

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
# The mergers: where those of deepstack lie, and what their parts are called.
VL = ("deepstack_merger_list", {"norm": "norm", "mlp.up": "linear_fc1", "mlp.down": "linear_fc2"})
OMNI = ("merger_list", {"norm": "ln_q", "mlp.up": "mlp.0", "mlp.down": "mlp.2"})


def weights(tower: str, names: tuple[str, dict[str, str]] = VL) -> shared.Weights:
    """tower: the prefix of its tensors. Those of deepstack are not asked for where there is none."""
    block, (deepstack, parts) = f"{tower}blocks.{{i}}.", names
    mergers = {"merger": "merger", "deepstack_mergers.{i}": f"{deepstack}.{{i}}"}
    return {
        "vision.patch_embedding.weight": flattened(f"{tower}patch_embed.proj.weight"),
        "vision.patch_embedding.bias": f"{tower}patch_embed.proj.bias",
        "vision.position_embedding": f"{tower}pos_embed.weight",
        **shared.renamed(
            {
                "vision.blocks.{i}.attention_norm": f"{block}norm1",
                "vision.blocks.{i}.mlp_norm": f"{block}norm2",
                "vision.blocks.{i}.attention.qkv": f"{block}attn.qkv",
                "vision.blocks.{i}.attention.out": f"{block}attn.proj",
                "vision.blocks.{i}.mlp.up": f"{block}mlp.linear_fc1",
                "vision.blocks.{i}.mlp.down": f"{block}mlp.linear_fc2",
                **{
                    f"vision.{ours}.{part}": f"{tower}{theirs}.{name}"
                    for ours, theirs in mergers.items()
                    for part, name in parts.items()
                },
            },
            shared.BOTH,
        ),
    }


def config(vision: Fields, deepstack_layers: tuple[int, ...] = ()) -> GridVisionConfig:
    """The canonical tower."""
    sizes, positions = shared.vision_sizes(vision), vision.positive("num_position_embeddings")
    if math.isqrt(positions) ** 2 != positions:
        raise vision.invalid("num_position_embeddings", positions, "a square number")
    return GridVisionConfig(
        **sizes,
        mlp=MLPConfig(vision.positive("intermediate_size"), vision.choice("hidden_act", _ACTIVATIONS), gated=False),
        norm="layer",
        epsilon=1e-6,
        qkv_bias=True,
        out_bias=True,
        outer_norms=False,
        position_grid=math.isqrt(positions),
        position_resampling="bilinear",
        out=vision.positive("out_hidden_size"),
        merger=MergerConfig("mlp", width=sizes["hidden"] * sizes["merge_size"] ** 2),
        deepstack_layers=deepstack_layers,
    )
