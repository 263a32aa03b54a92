"""The decoder of ERNIE 4.5, for text alone and for images: fields of its layers, and where its weights lie.

Source: transformers 5.24 `models/ernie4_5_moe`: Ernie4_5_MoeModel, and `models/ernie4_5_vl_moe`:
Ernie4_5_VLMoeTextModel, whose experts for images have another width than those for text.
"""

from collections.abc import Collection

from msgspec import structs

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis, rope_fields
from moevlm.export.families.sources import halves, reordered, row_of
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import RopeMetadata


def ernie_decoder(
    text: Fields, tied: bool, rope: RopeMetadata, sparse: Collection[int], width: int, image_width: int = 0
) -> DecoderConfig:
    """The decoder of a text's fields. tied: the head is the embedding. sparse: numbers of the layers with experts.

    width, image_width: of an expert for text, and of one for images; 0 where there are none for images.
    """
    text.choice("use_bias", (False,), False)
    attention = GQAConfig(
        heads=text.positive("num_attention_heads"),
        kv_heads=text.positive("num_key_value_heads", 4),
        head_dim=shared.head_dim(text),
        rotary_dim=rope.dim,
    )
    activation = text.choice("hidden_act", {"silu": "silu"}, "silu")
    # transformers divides by their sum, but never by less than that; it is added here, which is the same in float32.
    text.choice("moe_norm_min", (1e-12,), 1e-12)
    moe = MoEConfig(
        experts=text.aliased("moe_num_experts", "num_experts", 64),
        width=width,
        router=RouterSpec(top_k=text.aliased("moe_k", "num_experts_per_tok", 6), epsilon=1e-12),
        expert=ExpertsSpec(activation=activation),
        correction_bias=True,
        shared_width=width * text.count("moe_num_shared_experts", 2),
        image_width=image_width,
    )
    dense = MLPConfig(text.positive("intermediate_size"), activation)
    return shared.decoder(
        text,
        epsilon=1e-5,
        tied=tied,
        rope=rope,
        layer=lambda i: LayerConfig(attention, moe if i in sparse else dense),
    )


def ernie_image_decoder(text: Fields, tied: bool) -> DecoderConfig:
    """The decoder of config.json's text_config, of a model that sees images. tied: the head is the embedding."""
    widths = text.counts("moe_intermediate_size", (1536, 512))
    if len(widths) != 2 or not all(widths):
        raise text.invalid("moe_intermediate_size", list(widths), "two widths, for text and for images")
    count = text.positive("num_hidden_layers")
    kinds = text.each("mlp_layer_types", ("dense", "sparse"), ("dense", *("sparse",) * (count - 1)))
    return ernie_decoder(text, tied, _rope(text), [i for i in range(count) if kinds[i] == "sparse"], *widths)


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


def ernie_weights(model: str, head_dim: int, banks: int = 1) -> shared.Weights:
    """Of the decoder, with the experts for text. model: the prefix of all. banks: 2 with experts for images.

    What turns together lies side by side on the disk, and is read as halves.
    """
    ours, theirs = "decoder.layers.{i}.", f"{model}layers.{{i}}."
    pairs, bias = halves(head_dim), f"{theirs}mlp.moe_statics.e_score_correction_bias"
    return {
        **shared.decoder_weights(Experts(f"{theirs}mlp.experts", per_expert=True), model),
        **{f"{ours}attention.{p}.weight": reordered(f"{theirs}self_attn.{p}_proj.weight", pairs) for p in "qk"},
        f"{ours}feed_forward.correction_bias": row_of(bias, 0, banks),
    }
