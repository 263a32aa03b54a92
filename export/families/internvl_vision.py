"""The vision part of InternVL: fields of its tower and projector, where their weights lie.

Source: transformers 5.24 `models/internvl`: InternVLVisionModel, InternVLMultiModalProjector and
InternVLModel.get_image_features.
"""

from moevlm.export.config import MLPConfig, ProjectorConfig, TileVisionConfig
from moevlm.export.families import shared
from moevlm.export.families.convolutions import flattened
from moevlm.export.families.fields import Fields
from moevlm.export.families.sources import Indices, Shape, Source, Tensors, named, without_batch
from moevlm.export.families.tiles import merged_side, positions, tile_sides
from moevlm.export.graph.weights import ScaledRows, Weight

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_EMBEDDINGS, _BLOCK = f"{_TOWER}embeddings.", f"{_TOWER}encoder.layer.{{i}}."
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


def internvl_tower(vision: Fields, fields: Fields, out: int) -> TileVisionConfig:
    """The tower of config.json's vision_config; the projector's fields lie beside that. out: width of the decoder."""
    hidden, heads = vision.positive("hidden_size", 1024), vision.positive("num_attention_heads", 16)
    depth, merge = vision.positive("num_hidden_layers", 24), merged_side(fields, "downsample_ratio")
    side, patch = tile_sides(vision, merge)
    vision.choice("use_absolute_position_embeddings", (True,), True)
    for key in (  # of training alone
        *("use_mask_token", "dropout", "projection_dropout", "layer_scale_init_value", "initializer_factor"),
    ):
        vision.get(key, None)
    pooled, layer = vision.flag("use_mean_pooling", True), fields.choice("vision_feature_layer", (-1, depth), -1)
    fields.choice("vision_feature_select_strategy", ("default",), "default")
    return TileVisionConfig(
        hidden=hidden,
        depth=depth,
        heads=heads,
        head_dim=hidden // heads,
        mlp=MLPConfig(
            vision.positive("intermediate_size", 4096), vision.choice("hidden_act", _ACTIVATIONS, "gelu"), gated=False
        ),
        epsilon=vision.number("layer_norm_eps", 1e-6),
        patch_size=patch,
        merge_size=merge,
        channels=vision.positive("num_channels", 3),
        rope_theta=0.0,
        out=out,
        side=side,
        norm=vision.choice("norm_type", {"layer_norm": "layer", "rms_norm": "rms"}, "layer_norm"),
        patch_bias=True,
        qkv_bias=vision.flag("attention_bias", False),
        out_bias=True,
        qk_norm=vision.flag("use_qk_norm", False),
        first_norm=False,
        last_norm=not pooled and layer == -1,
        projector=ProjectorConfig(
            widths=(out,),
            activation=fields.choice("projector_hidden_act", _ACTIVATIONS, "gelu"),
            norm=True,
            bias=True,
        ),
    )


def _scaled(pattern: str, factor: str) -> Source:
    """A projection whose output is multiplied by a vector, column by column (layer scale)."""

    def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        projection = named(pattern)(tensors, indices, shape, layout)
        return ScaledRows(projection, named(factor)(tensors, indices, shape[:1], layout))

    return source


INTERNVL_TOWER: shared.Weights = {
    "vision.patch_embedding.weight": flattened(f"{_EMBEDDINGS}patch_embeddings.projection.weight"),
    "vision.patch_embedding.bias": f"{_EMBEDDINGS}patch_embeddings.projection.bias",
    "vision.position_embedding": positions(
        without_batch(f"{_EMBEDDINGS}position_embeddings"),
        without_batch(f"{_EMBEDDINGS}cls_token"),
        joined=f"{_PROJECTOR}layer_norm.weight",
        class_first=True,
    ),
    **shared.joined_qkv(f"{_BLOCK}attention."),
    **{
        f"vision.blocks.{{i}}.attention.out.{part}": _scaled(
            f"{_BLOCK}attention.projection_layer.{part}", f"{_BLOCK}lambda_1"
        )
        for part in shared.BOTH
    },
    **{
        f"vision.blocks.{{i}}.mlp.down.{part}": _scaled(f"{_BLOCK}mlp.fc2.{part}", f"{_BLOCK}lambda_2")
        for part in shared.BOTH
    },
    **shared.renamed(
        {
            "vision.blocks.{i}.attention_norm": f"{_BLOCK}layernorm_before",
            "vision.blocks.{i}.attention.q_norm": f"{_BLOCK}attention.q_norm",
            "vision.blocks.{i}.attention.k_norm": f"{_BLOCK}attention.k_norm",
            "vision.blocks.{i}.mlp_norm": f"{_BLOCK}layernorm_after",
            "vision.blocks.{i}.mlp.up": f"{_BLOCK}mlp.fc1",
            "vision.last_norm": f"{_TOWER}layernorm",
            "vision.projector.norm": f"{_PROJECTOR}layer_norm",
            "vision.projector.layers.0": f"{_PROJECTOR}linear_1",
            "vision.projector.layers.1": f"{_PROJECTOR}linear_2",
        },
        shared.BOTH,
    ),
}
# Tensors that the tower may have and this model does not need, and why.
INTERNVL_LEFT_OUT = {
    r"vision_tower\.embeddings\.mask_token": "masked patches are of training",
    r"vision_tower\.layernorm\.": "visual tokens are made before the last norm",
}
