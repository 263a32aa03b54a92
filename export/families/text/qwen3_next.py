"""Qwen3-Next: the gated delta rule and gated GQA of Qwen3.5, whose projections lie together, by key heads.

Source: transformers 5.24 `models/qwen3_next`. Checkpoints: Qwen/Qwen3-Next-80B-A3B-Instruct, ...-Thinking,
Qwen3-Coder-Next.
"""

from typing import ClassVar, Self

from moevlm.export.config import DecoderConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.qwen3_5_text import qwen3_5_decoder, qwen3_5_experts, qwen3_5_text_weights
from moevlm.export.families.rope import one_axis
from moevlm.export.families.sources import blocks_of_rows
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text


@register_alone("qwen3_next", "Qwen3-Next-80B-A3B", "Qwen3-Coder-Next")
@register_text("qwen3_next")
class Qwen3Next(TextModel):
    """See the module's docstring. keys, values: rows of a key head's keys, and of its values."""

    mixer = "gated delta rule, each fourth layer gated GQA, partial rope"
    routing = "softmax, renormalised, gated shared expert"
    router_suffix = "mlp.gate"
    left_out: ClassVar = {r"^mtp.*": shared.NEXT_TOKENS}

    def __init__(self, keys: int, values: int, group: int) -> None:
        """group: value heads of a key head."""
        self._keys, self._values, self._group = keys, values, group

    @classmethod
    def of(cls, text: Fields) -> Self:
        group = text.positive("linear_num_value_heads") // text.positive("linear_num_key_heads")
        return cls(text.positive("linear_key_head_dim"), group * text.positive("linear_value_head_dim"), group)

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        text.choice("decoder_sparse_step", (1,), 1)
        if text.counts("mlp_only_layers", ()):
            raise text.invalid("mlp_only_layers", text["mlp_only_layers"], "none, for every layer has experts")
        text.get("intermediate_size", None)  # of layers without experts
        moe = qwen3_5_experts(text, text.flag("norm_topk_prob", True))
        rope = one_axis(text, text.positive("head_dim", 256), default_partial=0.25)
        return qwen3_5_decoder(text, tied, moe, rope)

    def weights(self, model: str, head: str) -> shared.Weights:
        ours, delta = "decoder.layers.{i}.attention.", f"{model}layers.{{i}}.linear_attn."
        projections, k, v, g = f"{delta}in_proj_qkvz.weight", self._keys, self._values, self._group
        return {
            **qwen3_5_text_weights(model, per_expert=True),
            "decoder.head": head,
            f"{ours}qkv.weight": blocks_of_rows(projections, (k, k, v, v), (0, 1, 2)),
            f"{ours}z.weight": blocks_of_rows(projections, (k, k, v, v), (3,)),
            f"{ours}b.weight": blocks_of_rows(f"{delta}in_proj_ba.weight", (g, g), (0,)),
            f"{ours}a.weight": blocks_of_rows(f"{delta}in_proj_ba.weight", (g, g), (1,)),
        }
