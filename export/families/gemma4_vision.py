"""The vision part of Gemma 4: fields of its tower, where its weights lie, the tokens around an image.

Source: transformers 5.24 `models/gemma4`: Gemma4VisionModel and Gemma4MultimodalEmbedder.
"""

import numpy as np

from moevlm.export.config import MLPConfig, PooledVisionConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import axial_theta
from moevlm.export.families.sources import (
    Indices,
    Shape,
    Source,
    Tensors,
    changed,
    head_size,
    named,
    rooted,
    side_by_side,
)
from moevlm.export.graph.rearranged import Flat, Reordered
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.manifest import ImageMarks

_TOWER = "model.vision_tower."
_BLOCK, _ATTENTION = f"{_TOWER}encoder.layers.{{i}}.", f"{_TOWER}encoder.layers.{{i}}.self_attn."


def gemma4_tower(vision: Fields, out: int) -> PooledVisionConfig:
    """The tower of config.json's vision_config. out: width of the decoder."""
    vision.choice("use_clipped_linears", (False,), False)
    heads = vision.positive("num_attention_heads", 12)
    if vision.positive("num_key_value_heads", heads) != heads:
        raise vision.invalid("num_key_value_heads", vision["num_key_value_heads"], f"num_attention_heads = {heads}")
    if (pool := vision.positive("pooling_kernel_size", 3)) < 2:  # the reference gives no image without pooling
        raise vision.invalid("pooling_kernel_size", pool, "2 or more")
    for key in ("attention_bias", "max_position_embeddings", "global_head_dim", "default_output_length"):
        vision.get(key, None)  # the reference's tower reads none of them
    activation = vision.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh")
    return PooledVisionConfig(
        hidden=vision.positive("hidden_size", 768),
        depth=vision.positive("num_hidden_layers", 16),
        heads=heads,
        head_dim=vision.positive("head_dim", 64),
        mlp=MLPConfig(vision.positive("intermediate_size", 3072), activation),
        epsilon=vision.number("rms_norm_eps", 1e-6),
        patch_size=vision.positive("patch_size", 16),
        merge_size=pool,
        channels=3,
        rope_theta=axial_theta(vision, 100.0),
        out=out,
        position_table=vision.positive("position_embedding_size", 10240),
        standardize=vision.flag("standardize", False),
    )


def image_marks(fields: Fields) -> ImageMarks:
    """What stands around an image."""
    begin, end = fields.count("boi_token_id", 255_999), fields.count("eoi_token_id", 258_882)
    return ImageMarks(begin=(begin,), end=(end,))


def _axial(source: Source) -> Source:
    """Rows of heads, or one head's numbers, so that dimension j turns with j + dim / 2.

    Theirs turns j with j + dim / 4 in the half of either axis.
    """

    def ordered(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        weight = source(tensors, indices, shape, layout)
        dim = head_size(tensors, f"{_ATTENTION}q_norm.weight".format(**indices), shape[0], unit=4)
        return Reordered(weight, np.arange(dim).reshape(2, 2, dim // 4).swapaxes(0, 1).reshape(-1).tolist())

    return ordered


def _positions(name: str) -> Source:
    """The tables of both axes, one behind the other."""
    return changed(name, lambda tables, _: Flat(tables), lambda shape: (2, shape[0] // 2, shape[1]))


GEMMA4_TOWER: shared.Weights = {
    "vision.patch_embedding.weight": f"{_TOWER}patch_embedder.input_proj.weight",
    "vision.position_embedding": _positions(f"{_TOWER}patch_embedder.position_embedding_table"),
    # Theirs are for patches that were multiplied by the root of their width.
    "vision.standard_bias": rooted(f"{_TOWER}std_bias", -1),
    "vision.standard_gain": rooted(f"{_TOWER}std_scale", 1),
    "vision.projection.weight": "model.embed_vision.embedding_projection.weight",
    "vision.blocks.{i}.attention.qkv.weight": side_by_side(
        *(_axial(named(f"{_ATTENTION}{name}_proj.linear.weight")) for name in "qk"),
        named(f"{_ATTENTION}v_proj.linear.weight"),
    ),
    # Scores have a scale here, which this gain takes away: theirs have none.
    "vision.blocks.{i}.attention.q_norm.weight": _axial(rooted(f"{_ATTENTION}q_norm.weight", 1)),
    "vision.blocks.{i}.attention.k_norm.weight": _axial(named(f"{_ATTENTION}k_norm.weight")),
    **shared.renamed(
        {
            f"vision.blocks.{{i}}.{ours}": f"{_BLOCK}{theirs}"
            for ours, theirs in {
                "attention.out": "self_attn.o_proj.linear",
                "attention_norm": "input_layernorm",
                "attention_post_norm": "post_attention_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
                **{f"mlp.{part}": f"mlp.{part}_proj.linear" for part in shared.GATED},
            }.items()
        }
    ),
}
