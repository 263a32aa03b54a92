"""The vision part of Aria: fields of its tower and projector, where their weights lie.

Source: transformers 5.24 `models/idefics3`: Idefics3VisionTransformer, and `models/aria`: AriaProjector and
AriaModel.get_image_features.
"""

from moevlm.export.config import MLPConfig, QueryVisionConfig
from moevlm.export.families import shared
from moevlm.export.families.convolutions import flattened
from moevlm.export.families.fields import Fields
from moevlm.export.families.sources import Indices, Shape, Source, Tensors, changed, stored
from moevlm.export.graph.rearranged import RowBlocks
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.errors import CheckpointError

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_BLOCK, _CROSS = f"{_TOWER}encoder.layers.{{i}}.", f"{_PROJECTOR}cross_attn."
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
_LONGEST = 980  # pixels of the longer side of an image: AriaProcessor asks for them, whatever a file says
_QUERIES = {"1225": 128, "4900": 256}  # by the patches of an image with its padding


def aria_tower(vision: Fields, fields: Fields, out: int) -> QueryVisionConfig:
    """The tower of config.json's vision_config; the projector's fields lie beside that. out: width of the decoder.

    Raises CheckpointError for patches of which an image has no whole number, or a number without queries.
    """
    vision.get("tie_word_embeddings", None)  # transformers 4 wrote it everywhere; a vision tower has no head
    vision.choice("model_type", ("idefics3_vision",), "idefics3_vision")
    vision.choice("tie_last_hidden_states", (False,), False)  # or visual tokens are made behind another norm
    hidden, heads = vision.positive("hidden_size", 1152), vision.positive("num_attention_heads", 16)
    depth, patch = vision.positive("num_hidden_layers", 12), vision.positive("patch_size", 32)
    vision.repeated("attention_heads", heads)  # as published files have it
    fields.choice("vision_feature_layer", (-1, depth), -1)
    image = vision.positive("image_size", 224)
    if image < patch:
        raise vision.invalid("image_size", image, f"{patch}, the side of a patch, or more")
    if _LONGEST % patch:
        raise vision.invalid("patch_size", patch, f"a divisor of {_LONGEST}, the side of an image")
    return QueryVisionConfig(
        hidden=hidden,
        depth=depth,
        heads=heads,
        head_dim=hidden // heads,
        mlp=MLPConfig(
            vision.positive("intermediate_size", 3072),
            vision.choice("hidden_act", _ACTIVATIONS, "gelu_pytorch_tanh"),
            gated=False,
        ),
        epsilon=vision.number("layer_norm_eps", 1e-6),
        patch_size=patch,
        merge_size=1,
        channels=vision.positive("num_channels", 3),
        rope_theta=0.0,
        out=out,
        queries=_queries(fields, _LONGEST // patch),
        side=_LONGEST // patch,
        position_grid=image // patch,
    )


def _queries(fields: Fields, side: int) -> int:
    """Visual tokens of an image, which has so many patches a side with its padding."""
    key, patches = "projector_patch_to_query_dict", str(side**2)
    fields.get(f"max_value_{key}", None)  # what follows from the other
    table = fields.sub(key, _QUERIES)
    queries = {size: table.positive(size) for size in fields.get(key, _QUERIES)}
    if patches not in queries:
        raise fields.invalid(key, dict(queries), f"{patches} among them, the patches of an image with its padding")
    return queries[patches]


def _first_queries(tensors: Tensors, _indices: Indices, shape: Shape, _layout: str) -> Weight:
    """Of the queries for the largest images, those of smaller ones are the first."""
    name = f"{_PROJECTOR}query"
    weight = stored(tensors, name)
    if len(weight.shape) != 2 or weight.shape[1] != shape[1] or weight.shape[0] < shape[0]:
        asked = f"{shape[0]} or more queries of {shape[1]}"
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}, the config asks for {asked}")
    return RowBlocks(weight, shape[0], weight.shape[0], 0)


def _third(pattern: str, part: int) -> Source:
    """Queries, keys or values of a projection that has all three, one behind the other."""
    return changed(
        pattern,
        lambda weight, shape: RowBlocks(weight, shape[0], 3 * shape[0], part * shape[0]),
        lambda shape: (3 * shape[0], *shape[1:]),
    )


ARIA_TOWER: shared.Weights = {
    "vision.patch_embedding.weight": flattened(f"{_TOWER}embeddings.patch_embedding.weight"),
    "vision.patch_embedding.bias": f"{_TOWER}embeddings.patch_embedding.bias",
    "vision.position_embedding": f"{_TOWER}embeddings.position_embedding.weight",
    **shared.joined_qkv(f"{_BLOCK}self_attn."),
    "vision.queries": _first_queries,
    **{
        f"vision.{ours}.1.{part}": _third(f"{_CROSS}multihead_attn.in_proj_{part}", third)
        for third, ours in enumerate(("asked", "keys", "values"))
        for part in shared.BOTH
    },
    **shared.renamed(
        {
            "vision.asked.0": f"{_CROSS}q_proj",
            "vision.keys.0": f"{_CROSS}k_proj",
            "vision.values.0": f"{_CROSS}v_proj",
            "vision.up": f"{_PROJECTOR}feed_forward.linear_in",
            "vision.down": f"{_PROJECTOR}feed_forward.linear_out",
        }
    ),
    **shared.renamed(
        {
            "vision.blocks.{i}.attention_norm": f"{_BLOCK}layer_norm1",
            "vision.blocks.{i}.attention.out": f"{_BLOCK}self_attn.out_proj",
            "vision.blocks.{i}.mlp_norm": f"{_BLOCK}layer_norm2",
            "vision.blocks.{i}.mlp.up": f"{_BLOCK}mlp.fc1",
            "vision.blocks.{i}.mlp.down": f"{_BLOCK}mlp.fc2",
            "vision.query_norm": f"{_CROSS}layer_norm",
            "vision.patch_norm": f"{_CROSS}layer_norm_kv",
            "vision.out": f"{_CROSS}multihead_attn.out_proj",
            "vision.joined": f"{_CROSS}linear",
            "vision.norm": f"{_PROJECTOR}layer_norm",
        },
        shared.BOTH,
    ),
}
# A tensor that the tower may have and this model does not need, and why.
ARIA_LEFT_OUT = {r"vision_tower\.post_layernorm\.": "visual tokens are made before the last norm"}
