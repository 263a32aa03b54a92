"""Qwen3.5 MoE, Qwen3.6: three layers of the gated delta rule to one of gated GQA, a gated shared expert, norms 1 + w.

Source: transformers 5.24 `models/qwen3_5_moe`.
"""

from typing import ClassVar

from moevlm.export.config import MLPConfig, ModelConfig, MoEConfig
from moevlm.export.families import qwen_vision, shared
from moevlm.export.families.about import About
from moevlm.export.families.base import LEFT_OUT, Family, register
from moevlm.export.families.fields import Fields
from moevlm.export.families.qwen3_5_text import qwen3_5_decoder, qwen3_5_experts, qwen3_5_rope, qwen3_5_text_weights


@register("qwen3_5_moe")
class Qwen35Moe(Family):
    """See the module's docstring."""

    about = About(
        checkpoints=("Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B", "Qwen3.6-35B-A3B"),
        mixer="gated delta rule, each fourth layer gated GQA, interleaved M-RoPE",
        routing="softmax, renormalised, gated shared expert",
        vision="packed grid",
    )
    model_type = "qwen3_5_moe"
    router_suffix = "mlp.gate"
    left_out: ClassVar = {**LEFT_OUT, r"^mtp.*": shared.NEXT_TOKENS}
    weights: ClassVar[shared.Weights] = {
        **qwen3_5_text_weights("model.language_model."),
        **qwen_vision.weights("model.visual."),
    }

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        text.get("tie_word_embeddings", False)  # the outer field decides
        return ModelConfig(
            model_type=self.model_type,
            decoder=qwen3_5_decoder(
                text, fields.flag("tie_word_embeddings", False), self.feed_forward(text), qwen3_5_rope(text)
            ),
            vision=qwen_vision.config(vision),
            video=shared.video(fields, "vision_start_token_id", "vision_end_token_id"),
            **shared.token_ids(fields, text),
        )

    def feed_forward(self, text: Fields) -> MLPConfig | MoEConfig:
        """Of every layer."""
        return qwen3_5_experts(text, text.choice("norm_topk_prob", (True,), True))
