"""GLM-4.5: sigmoid routing with a correction bias and expert groups, shared experts, dense first layers, partial rope.

Source: transformers 5.24 `models/glm4_moe`. Checkpoints: zai-org/GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7.
"""

from typing import ClassVar

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.export.families.text.grouped import grouped_experts
from moevlm.runtime.core.manifest import RopeMetadata

# Layers behind the last one, of the models of 46 and of 92: they predict a second token, for training.
NEXT_TOKENS = dict.fromkeys((r"model\.layers\.92.*", r"model\.layers\.46.*"), shared.NEXT_TOKENS)


@register_alone("glm4_moe", "GLM-4.5", "GLM-4.5-Air", "GLM-4.6")
@register_text("glm4_moe")
class Glm4Moe(TextModel):
    """See the module's docstring."""

    mixer = "GQA, with q/k norms or without, partial rope"
    routing = "sigmoid, correction bias, groups; shared experts"
    router_suffix = "mlp.gate"
    config_names: ClassVar = {"experts": "n_routed_experts"}
    left_out: ClassVar = NEXT_TOKENS

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        rope = one_axis(text, shared.head_dim(text), default_partial=0.5)
        return glm4_decoder(text, tied=tied, rope=rope, bias=False, qk_norm=text.flag("use_qk_norm", False))

    def weights(self, model: str, head: str) -> shared.Weights:
        experts = Experts(f"{model}layers.{{i}}.mlp.experts", per_expert=True)
        return {**shared.decoder_weights(experts, model), "decoder.head": head}


def glm4_decoder(text: Fields, *, tied: bool, rope: RopeMetadata, bias: bool, qk_norm: bool) -> DecoderConfig:
    """The decoder of GLM-4.5 and of GLM-4.5V. bias: of queries, keys and values where config.json says nothing."""
    attention = GQAConfig(
        heads=text.positive("num_attention_heads"),
        kv_heads=text.positive("num_key_value_heads"),
        head_dim=shared.head_dim(text),
        rotary_dim=rope.dim,
        qk_norm=qk_norm,
        qkv_bias=text.flag("attention_bias", bias),
    )
    moe = grouped_experts(text, "sigmoid")
    dense = MLPConfig(text.positive("intermediate_size"), moe.expert.activation)
    dense_layers = text.count("first_k_dense_replace", 1)
    shared.all_attend(text)
    return shared.decoder(
        text,
        epsilon=1e-5,
        tied=tied,
        rope=rope,
        layer=lambda i: LayerConfig(attention, dense if i < dense_layers else moe),
    )
