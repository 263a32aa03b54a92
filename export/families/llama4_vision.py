"""The vision part of Llama 4: fields of its tower and projector, where their weights lie.

Source: transformers 5.24 `models/llama4`: Llama4VisionModel and Llama4MultiModalProjector.
"""

from moevlm.export.config import MLPConfig, ProjectorConfig, TileVisionConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import axial_theta
from moevlm.export.families.sources import as_row, halves, named, reordered, side_by_side
from moevlm.export.families.tiles import merged_side, positions, tile_sides

_TOWER, _ADAPTER = "vision_model.", "vision_model.vision_adapter.mlp."
_BLOCK = f"{_TOWER}model.layers.{{i}}."


def llama4_tower(vision: Fields, out: int) -> TileVisionConfig:
    """The tower of config.json's vision_config. out: width of the decoder."""
    hidden, heads = vision.positive("hidden_size", 768), vision.positive("num_attention_heads", 16)
    merge = merged_side(vision, "pixel_shuffle_ratio")
    (side, patch), width = tile_sides(vision, merge), vision.positive("intermediate_size", 5632)
    if width != hidden * merge**2:  # the reference takes one field for two widths
        raise vision.invalid("intermediate_size", width, f"{hidden * merge**2}, that of the patches of a visual token")
    projector = vision.positive("projector_input_dim", 4096)
    for key, default in (("projector_output_dim", 4096), ("vision_output_dim", 7680)):
        if vision.positive(key, default) != projector:
            raise vision.invalid(key, vision.get(key, default), f"projector_input_dim = {projector}")
    for key in (
        *("hidden_act", "norm_eps", "vision_feature_layer", "vision_feature_select_strategy"),
        *("multi_modal_projector_bias", "projector_dropout"),
    ):
        vision.get(key, None)  # the reference's tower reads none of them
    return TileVisionConfig(
        hidden=hidden,
        depth=vision.positive("num_hidden_layers", 34),
        heads=heads,
        head_dim=hidden // heads,
        mlp=MLPConfig(width, "gelu", gated=False),
        epsilon=1e-5,
        patch_size=patch,
        merge_size=merge,
        channels=vision.positive("num_channels", 3),
        rope_theta=axial_theta(vision),
        out=out,
        side=side,
        norm="layer",
        patch_bias=False,
        qkv_bias=True,
        out_bias=True,
        qk_norm=False,
        first_norm=True,
        last_norm=True,
        projector=ProjectorConfig(widths=(projector, projector), activation="gelu", norm=False, bias=False),
    )


def llama4_tower_weights(head_dim: int) -> shared.Weights:
    """Where its weights lie. head_dim: of the tower's heads, whose rows turn in pairs of neighbours on disk."""
    order = halves(head_dim)
    return {
        "vision.patch_embedding.weight": f"{_TOWER}patch_embedding.linear.weight",
        "vision.position_embedding": positions(
            named(f"{_TOWER}positional_embedding_vlm"),
            as_row(f"{_TOWER}class_embedding"),
            joined=f"{_ADAPTER}fc1.weight",
            class_first=False,
        ),
        **{
            f"vision.blocks.{{i}}.attention.qkv.{part}": side_by_side(
                *(reordered(f"{_BLOCK}self_attn.{name}_proj.{part}", order) for name in "qk"),
                named(f"{_BLOCK}self_attn.v_proj.{part}"),
            )
            for part in shared.BOTH
        },
        **shared.renamed(
            {
                "vision.first_norm": f"{_TOWER}layernorm_pre",
                "vision.last_norm": f"{_TOWER}layernorm_post",
                "vision.blocks.{i}.attention_norm": f"{_BLOCK}input_layernorm",
                "vision.blocks.{i}.attention.out": f"{_BLOCK}self_attn.o_proj",
                "vision.blocks.{i}.mlp_norm": f"{_BLOCK}post_attention_layernorm",
                "vision.blocks.{i}.mlp.up": f"{_BLOCK}mlp.fc1",
                "vision.blocks.{i}.mlp.down": f"{_BLOCK}mlp.fc2",
                "vision.projector.layers.0": f"{_ADAPTER}fc1",
                "vision.projector.layers.1": f"{_ADAPTER}fc2",
                "vision.projector.layers.2": "multi_modal_projector.linear_1",
            },
            shared.BOTH,
        ),
    }
