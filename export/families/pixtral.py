"""The Pixtral tower with the projector of Mistral 3: fields of config.json, and where its weights lie.

Source: transformers 5.24 `models/pixtral`, and Mistral3MultiModalProjector of `models/mistral3`.
"""

from moevlm.export.config import MLPConfig, RotaryVisionConfig
from moevlm.export.families import shared
from moevlm.export.families.convolutions import flattened, unfolded
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import axial_theta

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_BLOCK = f"{_TOWER}transformer.layers.{{i}}."
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


def pixtral_tower(vision: Fields, fields: Fields, out: int, epsilon: float) -> RotaryVisionConfig:
    """The tower of config.json's vision_config; the projector's fields lie beside that.

    out, epsilon: width and epsilon of norms of the decoder.
    """
    hidden, heads = vision.positive("hidden_size", 1024), vision.positive("num_attention_heads", 16)
    vision.choice("head_dim", (hidden // heads,), hidden // heads)
    for key in ("image_size", "tie_word_embeddings", "vocab_size"):  # the reference's tower reads none of them
        vision.get(key, None)
    depth = vision.positive("num_hidden_layers", 24)
    fields.choice("vision_feature_layer", (-1, depth), -1)
    return RotaryVisionConfig(
        hidden=hidden,
        depth=depth,
        heads=heads,
        head_dim=hidden // heads,
        mlp=MLPConfig(vision.positive("intermediate_size", 4096), vision.choice("hidden_act", _ACTIVATIONS, "gelu")),
        epsilon=1e-5,
        patch_size=vision.positive("patch_size", 16),
        merge_size=fields.positive("spatial_merge_size", 2),
        channels=vision.positive("num_channels", 3),
        rope_theta=axial_theta(vision),
        out=out,
        joined_epsilon=epsilon,
        projector_activation=fields.choice("projector_hidden_act", _ACTIVATIONS, "gelu"),
        projector_bias=fields.flag("multimodal_projector_bias", False),
    )


PIXTRAL_TOWER: shared.Weights = {
    "vision.patch_embedding.weight": flattened(f"{_TOWER}patch_conv.weight"),
    **shared.joined_qkv(f"{_BLOCK}attention."),
    "vision.merger.join.weight": unfolded(f"{_PROJECTOR}patch_merger.merging_layer.weight"),
    **shared.renamed(
        {
            "vision.first_norm": f"{_TOWER}ln_pre",
            "vision.merger.norm": f"{_PROJECTOR}norm",
            "vision.blocks.{i}.attention_norm": f"{_BLOCK}attention_norm",
            "vision.blocks.{i}.attention.out": f"{_BLOCK}attention.o_proj",
            "vision.blocks.{i}.mlp_norm": f"{_BLOCK}ffn_norm",
            **{f"vision.blocks.{{i}}.mlp.{part}": f"{_BLOCK}feed_forward.{part}_proj" for part in shared.GATED},
        }
    ),
    **shared.renamed(
        {"vision.merger.up": f"{_PROJECTOR}linear_1", "vision.merger.down": f"{_PROJECTOR}linear_2"}, shared.BOTH
    ),
}
