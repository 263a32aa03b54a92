"""ERNIE 4.5: GQA whose pairs turn side by side, softmax routing with a correction bias, shared experts.

Source: transformers 5.24 `models/ernie4_5_moe`. Checkpoints: baidu/ERNIE-4.5-21B-A3B-PT, ...-21B-A3B-Thinking,
...-300B-A47B-PT.
"""

from typing import ClassVar, Self

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.sources import halves, reordered, row_of
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

_UNREAD = ("moe_capacity", "moe_gate", "moe_use_aux_free")  # by transformers; of training


@register_alone("ernie4_5_moe", "ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B")
@register_text("ernie4_5_moe")
class Ernie45Moe(TextModel):
    """See the module's docstring. What turns together lies side by side on the disk, and is read as halves."""

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
        text.choice("use_bias", (False,), False)
        head_dim = shared.head_dim(text)
        rope = one_axis(text, head_dim)
        attention = GQAConfig(
            heads=text.positive("num_attention_heads"),
            kv_heads=text.positive("num_key_value_heads", 4),
            head_dim=head_dim,
            rotary_dim=rope.dim,
            qk_norm=False,
            qkv_bias=False,
            out_bias=False,
        )
        moe = self._moe(text)
        dense, sparse = MLPConfig(text.positive("intermediate_size"), moe.expert.activation), self._sparse(text)
        return shared.decoder(
            text,
            epsilon=1e-5,
            tied=tied,
            rope=rope,
            layer=lambda i: LayerConfig(attention, moe if i in sparse else dense),
        )

    def weights(self, model: str, head: str) -> shared.Weights:
        ours, theirs = "decoder.layers.{i}.", f"{model}layers.{{i}}."
        pairs, bias = halves(self._head_dim), f"{theirs}mlp.moe_statics.e_score_correction_bias"
        return {
            **shared.decoder_weights(Experts(f"{theirs}mlp.experts", per_expert=True), model),
            "decoder.head": head,
            **{
                f"{ours}attention.{part}.weight": reordered(f"{theirs}self_attn.{part}_proj.weight", pairs)
                for part in "qk"
            },
            f"{ours}feed_forward.correction_bias": row_of(bias, 0, 1),
        }

    def _sparse(self, text: Fields) -> range:
        """Numbers of the layers with experts."""
        every, first = text.positive("moe_layer_interval", 1), text.count("moe_layer_start_index", 1)
        layers, name = text.positive("num_hidden_layers"), "moe_layer_end_index"
        last = layers - 1 if text.get(name, layers - 1) == -1 else text.count(name, layers - 1)
        start = -(-(first + 1) // every) * every - 1  # of those whose number, counted from 1, every divides
        return range(start, min(layers, last + 1), every)

    def _moe(self, text: Fields) -> MoEConfig:
        # transformers divides by their sum, but never by less than that; it is added here, the same in float32.
        text.choice("moe_norm_min", (1e-12,), 1e-12)
        width = text.positive("moe_intermediate_size", 1536)
        return MoEConfig(
            experts=text.aliased("moe_num_experts", "num_experts", 64),
            width=width,
            router=RouterSpec(top_k=text.aliased("moe_k", "num_experts_per_tok", 6), epsilon=1e-12),
            expert=ExpertsSpec(activation=text.choice("hidden_act", {"silu": "silu"}, "silu")),
            correction_bias=True,
            shared_width=width * text.count("moe_num_shared_experts", 2),
        )
