"""The vision part of GLM-4.5V: fields of its tower and merger, and where their weights lie.

Source: transformers 5.24 `models/glm4v_moe`: Glm4vMoeVisionModel.
"""

from moevlm.export.config import GridVisionConfig, MergerConfig, MLPConfig
from moevlm.export.families import shared
from moevlm.export.families.convolutions import channels_last, flattened
from moevlm.export.families.fields import Fields

_TOWER = "model.visual."
_BLOCK = f"{_TOWER}blocks.{{i}}."


def glm_tower(vision: Fields) -> GridVisionConfig:
    """The tower of config.json's vision_config."""
    sizes, out = shared.vision_sizes(vision), vision.positive("out_hidden_size")
    activation = vision.choice("hidden_act", {"silu": "silu"})
    return GridVisionConfig(
        **sizes,
        mlp=MLPConfig(out, activation),  # the blocks' feed-forward is as wide as the tower's output
        norm="rms",
        epsilon=vision.number("rms_norm_eps", 1e-5),
        qkv_bias=vision.flag("attention_bias", False),
        out_bias=False,
        outer_norms=True,
        position_grid=vision.positive("image_size") // sizes["patch_size"],
        position_resampling="bicubic",
        out=out,
        merger=MergerConfig("gated", width=vision.positive("intermediate_size")),
    )


GLM_TOWER: shared.Weights = {
    "vision.patch_embedding.weight": flattened(f"{_TOWER}patch_embed.proj.weight"),
    "vision.patch_embedding.bias": f"{_TOWER}patch_embed.proj.bias",
    "vision.position_embedding": f"{_TOWER}embeddings.position_embedding.weight",
    "vision.merger.downsample.weight": channels_last(f"{_TOWER}downsample.weight"),
    "vision.merger.downsample.bias": f"{_TOWER}downsample.bias",
    **shared.renamed(
        {
            "vision.first_norm": f"{_TOWER}post_conv_layernorm",
            "vision.last_norm": f"{_TOWER}post_layernorm",
            "vision.blocks.{i}.attention_norm": f"{_BLOCK}norm1",
            "vision.blocks.{i}.mlp_norm": f"{_BLOCK}norm2",
            "vision.blocks.{i}.attention.out": f"{_BLOCK}attn.proj",
            **{f"vision.blocks.{{i}}.mlp.{part}": f"{_BLOCK}mlp.{part}_proj" for part in shared.GATED},
            "vision.merger.projection": f"{_TOWER}merger.proj",
            **{f"vision.merger.mlp.{part}": f"{_TOWER}merger.{part}_proj" for part in shared.GATED},
        }
    ),
    **shared.renamed(
        {
            "vision.blocks.{i}.attention.qkv": f"{_BLOCK}attn.qkv",
            "vision.merger.norm": f"{_TOWER}merger.post_projection_norm",
        },
        shared.BOTH,
    ),
}
