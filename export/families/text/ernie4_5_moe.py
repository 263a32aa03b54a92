"""ERNIE 4.5: GQA whose pairs turn side by side, softmax routing with a correction bias, shared experts.

Source: transformers 5.24 `models/ernie4_5_moe`. Checkpoints: baidu/ERNIE-4.5-21B-A3B-PT, ...-21B-A3B-Thinking,
...-300B-A47B-PT.
"""

from typing import ClassVar, Self

from moevlm.export.config import DecoderConfig
from moevlm.export.families import shared
from moevlm.export.families.ernie_text import ernie_decoder, ernie_weights
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text

_UNREAD = ("moe_capacity", "moe_gate", "moe_use_aux_free")  # by transformers; of training


@register_alone("ernie4_5_moe", "ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B")
@register_text("ernie4_5_moe")
class Ernie45Moe(TextModel):
    """See the module's docstring. head_dim: of the decoder's heads."""

    mixer = "GQA"
    routing = "softmax, correction bias, renormalised; shared experts"
    router_suffix = "mlp.gate"
    eos = (2,)
    tied = True
    config_names: ClassVar = {"experts": "moe_num_experts", "top_k": "moe_k"}
    left_out: ClassVar = {r"mtp": shared.NEXT_TOKENS}

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim

    @classmethod
    def of(cls, text: Fields) -> Self:
        return cls(shared.head_dim(text))

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        for name in _UNREAD:
            text.get(name, None)
        rope, width = one_axis(text, shared.head_dim(text)), text.positive("moe_intermediate_size", 1536)
        return ernie_decoder(text, tied, rope, self._sparse(text), width)

    def weights(self, model: str, head: str) -> shared.Weights:
        return {**ernie_weights(model, self._head_dim), "decoder.head": head}

    def _sparse(self, text: Fields) -> range:
        """Numbers of the layers with experts."""
        every, first = text.positive("moe_layer_interval", 1), text.count("moe_layer_start_index", 1)
        layers, name = text.positive("num_hidden_layers"), "moe_layer_end_index"
        last = layers - 1 if text.get(name, layers - 1) == -1 else text.count(name, layers - 1)
        start = -(-(first + 1) // every) * every - 1  # of those whose number, counted from 1, every divides
        return range(start, min(layers, last + 1), every)
