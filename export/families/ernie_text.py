"""The decoder of ERNIE 4.5 VL: fields of its layers, whose experts for images have another width than those for text.

Source: transformers 5.24 `models/ernie4_5_vl_moe`: Ernie4_5_VLMoeTextConfig and Ernie4_5_VLMoeTextModel.
"""

from msgspec import structs

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis, rope_fields
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import RopeMetadata


def ernie_decoder(text: Fields, tied: bool) -> DecoderConfig:
    """The decoder of config.json's text_config. tied: the head is the embedding."""
    text.choice("use_bias", (False,), False)
    rope = _rope(text)
    attention = GQAConfig(
        heads=text.positive("num_attention_heads"),
        kv_heads=text.positive("num_key_value_heads", 4),
        head_dim=rope.dim,
        rotary_dim=rope.dim,
    )
    activation = text.choice("hidden_act", {"silu": "silu"}, "silu")
    moe, dense = _moe(text, activation), MLPConfig(text.positive("intermediate_size"), activation)
    count = text.positive("num_hidden_layers")
    kinds = text.each("mlp_layer_types", ("dense", "sparse"), ("dense", *("sparse",) * (count - 1)))
    return shared.decoder(
        text,
        epsilon=1e-5,
        tied=tied,
        rope=rope,
        layer=lambda i: LayerConfig(attention, moe if kinds[i] == "sparse" else dense),
    )


def _rope(text: Fields) -> RopeMetadata:
    """mrope_section has height, width and time, in this order."""
    fields = rope_fields(text)
    fields.choice("rope_type", ("default",), "default")
    plain = one_axis(text, shared.head_dim(text), rope=fields)
    sections = fields.counts("mrope_section", (22, 22, 20))
    if len(sections) != 3 or sections[0] != sections[1] or sum(sections) != plain.dim // 2 or not sections[2]:
        allowed = f"height, width and time, the first two alike, that add up to {plain.dim // 2}"
        raise fields.invalid("mrope_section", list(sections), allowed)
    height, width, time = sections
    return structs.replace(plain, sections=(time, height, width), alternating=True)


def _moe(text: Fields, activation: str) -> MoEConfig:
    widths = text.counts("moe_intermediate_size", (1536, 512))
    if len(widths) != 2 or not all(widths):
        raise text.invalid("moe_intermediate_size", list(widths), "two widths, for text and for images")
    # transformers divides by their sum, but never by less than that; it is added here, which is the same in float32.
    text.choice("moe_norm_min", (1e-12,), 1e-12)
    return MoEConfig(
        experts=text.aliased("moe_num_experts", "num_experts"),
        width=widths[0],
        router=RouterSpec(top_k=text.aliased("moe_k", "num_experts_per_tok"), epsilon=1e-12),
        expert=ExpertsSpec(activation=activation),
        correction_bias=True,
        shared_width=widths[0] * text.count("moe_num_shared_experts", 2),
        image_width=widths[1],
    )
