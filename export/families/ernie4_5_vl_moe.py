"""ERNIE 4.5 VL: experts for text and others, of another width, for images; rope on three axes. Videos are left out.

Source: transformers 5.24 `models/ernie4_5_vl_moe`, and its renamings of what is published (`conversion_mapping.py`).
Checkpoints: baidu/ERNIE-4.5-VL-28B-A3B-PT, ...-424B-A47B-PT.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from msgspec import structs

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import Family, register
from moevlm.export.families.ernie_vision import ernie_tower, ernie_vision_weights
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis, rope_fields
from moevlm.export.families.sources import halves, reordered, row_of, turned
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import RopeMetadata

_LAYER, _MLP = "model.layers.{i}.", "model.layers.{i}.mlp."
_FEED, _IMAGES = "decoder.layers.{i}.feed_forward.", "decoder.layers.{i}.feed_forward.images."


@register("ernie4_5_vl_moe")
class Ernie45VLMoe(Family):
    """See the module's docstring. head_dim: of the decoder's heads."""

    about = About(
        checkpoints=("ERNIE-4.5-VL-28B-A3B", "ERNIE-4.5-VL-424B-A47B"),
        mixer="GQA, mrope",
        routing="softmax, correction bias, renormalised; others for images; shared experts",
        vision="packed grid, resampler",
    )
    router_suffix = "_moe.gate"
    config_names: ClassVar = {"experts": "text_config.moe_num_experts", "top_k": "text_config.moe_k"}

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls(shared.head_dim(Fields(values).sub("text_config")))

    @property
    def weights(self) -> shared.Weights:
        text, images = (Experts(f"{_MLP}experts", per_expert=True, bank=bank) for bank in range(2))
        pairs, bias = halves(self._head_dim), f"{_MLP}moe_statics.e_score_correction_bias"
        return {
            **shared.decoder_weights(text, "model."),
            **{
                f"decoder.layers.{{i}}.attention.{p}.weight": reordered(f"{_LAYER}self_attn.{p}_proj.weight", pairs)
                for p in "qk"
            },
            f"{_FEED}router.weight": turned(f"{_MLP}gate.weight"),
            f"{_IMAGES}router.weight": turned(f"{_MLP}gate.weight_1"),
            f"{_FEED}correction_bias": row_of(bias, 0, 2),
            f"{_IMAGES}correction_bias": row_of(bias, 1, 2),
            f"{_IMAGES}gate_up": images.gate_up(),
            f"{_IMAGES}down": images.down(),
            **ernie_vision_weights(),
        }

    def translate(self, fields: Fields) -> ModelConfig:
        text = fields.sub("text_config")
        text.get("tie_word_embeddings", None)  # the outer field decides
        ids = shared.token_ids(fields, text)
        around = [fields.count(f"image_{side}_token_id") for side in ("start", "end")]
        decoder = _decoder(text, fields.flag("tie_word_embeddings", True))
        decoder = replace(decoder, image_ids=(ids["image_token_id"], *around))
        return ModelConfig(
            model_type="ernie4_5_vl_moe",
            decoder=decoder,
            vision=ernie_tower(fields.sub("vision_config"), decoder.hidden, decoder.epsilon),
            **ids,
        )


def _decoder(text: Fields, tied: bool) -> DecoderConfig:
    text.choice("use_bias", (False,), False)
    rope, heads = _rope(text), text.positive("num_attention_heads")
    attention = GQAConfig(
        heads=heads,
        kv_heads=text.positive("num_key_value_heads", heads),
        head_dim=rope.dim,
        rotary_dim=rope.dim,
        qk_norm=False,
        qkv_bias=False,
        out_bias=False,
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
