"""Gemma 4 without its tower.

Source: transformers 5.24 `models/gemma4`: Gemma4ForCausalLM.
"""

from typing import TYPE_CHECKING, ClassVar

from moevlm.export.config import DecoderConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.gemma4_text import gemma4_decoder, gemma4_logits, gemma4_weights
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text

if TYPE_CHECKING:
    from torch import Tensor


@register_alone("gemma4_text", "Gemma-4-26B-A4B and -31B without a tower")
@register_text("gemma4_text")
class Gemma4Text(TextModel):
    """See the module's docstring."""

    mixer = "GQA in windows and to all, values from keys, partial rope, sandwich norms"
    routing = "softmax, renormalised, a factor for each expert; dense layer beside the experts"
    router_suffix = ".router"
    eos = (1,)
    tied = True
    config_names: ClassVar = {
        "head_dim without a window": "global_head_dim",
        "rotary_dim": "head_dim",
        "top_k": "top_k_experts",
    }

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        return gemma4_decoder(text, tied, visual=False)

    def weights(self, model: str, head: str) -> shared.Weights:
        return {**gemma4_weights(model), "decoder.head": head}

    def routed(self, returned: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
        probabilities, index = super().routed(returned)
        return gemma4_logits(probabilities), index
