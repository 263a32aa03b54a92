"""MoonViT and the projector of Kimi-K2.5: fields of config.json, and where its weights lie.

Source: transformers 5.24 `models/kimi_k25`, and its renamings of what is published (`conversion_mapping.py`).
"""

from typing import Any

import numpy as np

from moevlm.export.config import MLPConfig, MoonVisionConfig
from moevlm.export.families import shared
from moevlm.export.families.convolutions import flattened
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import axial_theta
from moevlm.export.families.sources import FirstOf, Indices, Shape, Source, Tensors, named, reordered, side_by_side
from moevlm.export.graph.rearranged import Flat, Reordered, RowBlocks
from moevlm.export.graph.weights import Concat, Weight

_TOWER, _PROJECTOR = "model.vision_tower.", "model.mm_projector."
_BLOCK, _PUBLISHED = f"{_TOWER}layers.{{i}}.", f"{_TOWER}encoder.blocks.{{i}}."
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# What the published config.json says of a tower for images, and transformers does not ask.
_ONLY = {
    "merge_type": ("sd2_tpool",),
    "mm_projector_type": ("patchmerger",),
    "pos_emb_type": ("divided_fixed",),
    "projector_hidden_act": ("gelu",),
    "video_attn_type": ("spatial_temporal",),
}


def head_dim(vision: Fields) -> int:
    """Of the tower's heads."""
    hidden = vision.aliased("hidden_size", "vt_hidden_size", 1152)
    return hidden // vision.aliased("num_attention_heads", "vt_num_attention_heads", 16)


def moon_tower(vision: Fields, fields: Fields, out: int) -> MoonVisionConfig:
    """The tower of config.json's vision_config; the projector's fields lie beside that. out: width of the decoder."""
    hidden = vision.aliased("hidden_size", "vt_hidden_size", 1152)
    heads = vision.aliased("num_attention_heads", "vt_num_attention_heads", 16)
    side = vision.aliased("pos_emb_height", "init_pos_emb_height", 64)
    if (width := vision.aliased("pos_emb_width", "init_pos_emb_width", 64)) != side:
        raise vision.invalid("pos_emb_width", width, f"pos_emb_height = {side}")
    for key in ("pos_emb_time", "init_pos_emb_time", "tie_word_embeddings"):  # of videos; of no part of a tower
        vision.get(key, None)
    for key, allowed in _ONLY.items():
        vision.choice(key, allowed, allowed[0])
    for part, key in ((fields, "projection_hidden_size"), (vision, "mm_hidden_size")):
        part.choice(key, (hidden,), hidden)
    vision.choice("text_hidden_size", (out,), out)
    return MoonVisionConfig(
        hidden=hidden,
        depth=vision.aliased("num_hidden_layers", "vt_num_hidden_layers", 27),
        heads=heads,
        head_dim=head_dim(vision),
        mlp=MLPConfig(
            vision.aliased("intermediate_size", "vt_intermediate_size", 4304),
            vision.choice("hidden_act", _ACTIVATIONS, "gelu_pytorch_tanh"),
            gated=False,
        ),
        epsilon=1e-5,
        patch_size=vision.positive("patch_size", 14),
        merge_size=_merge(vision),
        channels=3,
        rope_theta=axial_theta(vision),
        out=out,
        position_grid=side,
        projector_epsilon=fields.number("projection_layer_norm_eps", vision.number("projector_ln_eps", 1e-5)),
    )


def _merge(vision: Fields) -> int:
    sides = vision.counts("merge_kernel_size", (2, 2))
    if len(sides) != 2 or sides[0] != sides[1] or not 1 <= sides[0] <= 16:
        raise vision.invalid("merge_kernel_size", list(sides), "the same number twice, from 1 to 16")
    return sides[0]


def _qkv(part: str, head_dim: int) -> Source:
    """Three projections, or all in one as published; dimensions of queries and keys turn as `axial_rope` has them.

    A pair of dimensions turns by the column, the next one by the row. Published pairs lie side by side, a pair of
    transformers' lies half a head apart. part: weight or bias.
    """
    pairs = np.arange(head_dim // 2).reshape(-1, 2)[:, ::-1].T.reshape(-1)  # of rows, then of columns
    halves, published = [*pairs, *(pairs + head_dim // 2)], [*(2 * pairs), *(2 * pairs + 1)]
    q, k, v = (f"{_BLOCK}attn.{name}_proj.{part}" for name in "qkv")
    apart, whole = side_by_side(reordered(q, halves), reordered(k, halves), named(v)), named(f"{_PUBLISHED}wqkv.{part}")

    def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        if q.format(**indices) in tensors:
            return apart(tensors, indices, shape, layout)
        rows, size = whole(tensors, indices, shape, layout), shape[0] // 3
        *turning, values = (RowBlocks(rows, size, 3 * size, first * size) for first in range(3))
        return Concat([*(Reordered(each, published) for each in turning), values])

    return source


def _positions(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
    side = int(shape[0] ** 0.5)
    name = f"{_TOWER}patch_embed.pos_emb."
    table = FirstOf((f"{name}position_embeddings", f"{name}weight"))
    return Flat(table(tensors, indices, (side, side, shape[1]), layout))


def moon_weights(head_dim: int) -> shared.Weights:
    """By canonical names; each tensor under transformers' name or the published one. head_dim: of the tower's heads."""
    modules = {
        "vision.blocks.{i}.attention_norm": (f"{_BLOCK}norm1", f"{_PUBLISHED}norm0"),
        "vision.blocks.{i}.attention.out": (f"{_BLOCK}attn.proj", f"{_PUBLISHED}wo"),
        "vision.blocks.{i}.mlp_norm": (f"{_BLOCK}norm2", f"{_PUBLISHED}norm1"),
        "vision.blocks.{i}.mlp.up": (f"{_BLOCK}mlp.fc1", f"{_PUBLISHED}mlp.fc0"),
        "vision.blocks.{i}.mlp.down": (f"{_BLOCK}mlp.fc2", f"{_PUBLISHED}mlp.fc1"),
        "vision.last_norm": (f"{_TOWER}final_layernorm", f"{_TOWER}encoder.final_layernorm"),
        "vision.projector_norm": (f"{_PROJECTOR}pre_norm",),
        "vision.projector.up": (f"{_PROJECTOR}in_proj", f"{_PROJECTOR}proj.0"),
        "vision.projector.down": (f"{_PROJECTOR}out_proj", f"{_PROJECTOR}proj.2"),
    }
    table: dict[str, Any] = {
        f"{ours}.{part}": FirstOf(tuple(f"{name}.{part}" for name in theirs))
        for ours, theirs in modules.items()
        for part in shared.BOTH
    }
    return {
        "vision.patch_embedding.weight": flattened(f"{_TOWER}patch_embed.proj.weight"),
        "vision.patch_embedding.bias": f"{_TOWER}patch_embed.proj.bias",
        "vision.position_embedding": _positions,
        **{f"vision.blocks.{{i}}.attention.qkv.{part}": _qkv(part, head_dim) for part in shared.BOTH},
        **table,
    }
