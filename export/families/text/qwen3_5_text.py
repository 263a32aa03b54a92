"""Qwen3.5 and Qwen3.6 without their tower, as they are saved once they were trained on text.

Source: transformers 5.24 `models/qwen3_5_moe` and `models/qwen3_5`: Qwen3_5MoeForCausalLM, Qwen3_5ForCausalLM. Of text
alone the three axes of positions are one.
"""

from typing import ClassVar

from msgspec import structs

from moevlm.export.config import DecoderConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.qwen3_5_text import (
    qwen3_5_decoder,
    qwen3_5_dense,
    qwen3_5_experts,
    qwen3_5_rope,
    qwen3_5_text_weights,
)
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text


@register_alone("qwen3_5_moe_text", "Qwen3.5 and Qwen3.6 with experts, without a tower")
@register_text("qwen3_5_moe_text")
class Qwen35MoeText(TextModel):
    """See the module's docstring."""

    mixer = "gated delta rule, each fourth layer gated GQA, partial rope"
    routing = "softmax, renormalised, gated shared expert"
    router_suffix = "mlp.gate"
    left_out: ClassVar = {r"^mtp.*": shared.NEXT_TOKENS}

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        rope = structs.replace(qwen3_5_rope(text), sections=(), interleaved=False)
        return qwen3_5_decoder(text, tied, self.feed_forward(text), rope)

    def feed_forward(self, text: Fields) -> MLPConfig | MoEConfig:
        """Of every layer."""
        return qwen3_5_experts(text, text.choice("norm_topk_prob", (True,), True))

    def weights(self, model: str, head: str) -> shared.Weights:
        return {**qwen3_5_text_weights(model), "decoder.head": head}


@register_alone("qwen3_5_text", "Qwen3.5 and Qwen3.6 without experts and tower")
@register_text("qwen3_5_text")
class Qwen35Text(Qwen35MoeText):
    """See the module's docstring."""

    routing = "none: dense"

    def feed_forward(self, text: Fields) -> MLPConfig | MoEConfig:
        return qwen3_5_dense(text)
