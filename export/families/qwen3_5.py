"""Qwen3.5 and Qwen3.6 without experts: Qwen3.5 MoE with one dense feed-forward in every layer.

Source: transformers 5.24 `models/qwen3_5`.
"""

from moevlm.export.config import MLPConfig
from moevlm.export.families.about import About
from moevlm.export.families.base import register
from moevlm.export.families.fields import Fields
from moevlm.export.families.qwen3_5_moe import Qwen35Moe
from moevlm.export.families.qwen3_5_text import qwen3_5_dense


@register("qwen3_5")
class Qwen35(Qwen35Moe):
    """See the module's docstring."""

    about = About(
        checkpoints=("Qwen3.5-27B and smaller", "Qwen3.6-27B"),
        mixer="gated delta rule, each fourth layer gated GQA, interleaved M-RoPE",
        routing="none: dense",
        vision="packed grid",
    )
    model_type = "qwen3_5"

    def feed_forward(self, text: Fields) -> MLPConfig:
        return qwen3_5_dense(text)
