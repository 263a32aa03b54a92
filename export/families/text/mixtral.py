"""Mixtral: GQA, softmax over the chosen two of eight experts.

Source: transformers 5.24 `models/mixtral`. Checkpoints: mistralai/Mixtral-8x7B-Instruct-v0.1, ...-8x22B. On the hub an
expert's parts are w1 (gate), w3 (up) and w2 (down) of `block_sparse_moe`.
"""

from typing import ClassVar

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec


@register_alone("mixtral", "Mixtral-8x7B", "Mixtral-8x22B")
@register_text("mixtral")
class Mixtral(TextModel):
    """See the module's docstring."""

    mixer = "GQA"
    routing = "softmax, renormalised"
    eos = (2,)
    router_suffix = "mlp.gate"
    config_names: ClassVar = {
        "experts": "num_local_experts",
        "width of experts": "intermediate_size",
    }

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        rope = one_axis(text, shared.head_dim(text))
        attention = GQAConfig(
            heads=text.positive("num_attention_heads"),
            kv_heads=text.positive("num_key_value_heads", 8),
            head_dim=shared.head_dim(text),
            rotary_dim=rope.dim,
            window=text.positive("sliding_window") if "sliding_window" in text else 0,
        )
        moe = MoEConfig(
            experts=text.aliased("num_local_experts", "num_experts"),
            width=text.positive("intermediate_size"),
            router=RouterSpec(top_k=text.positive("num_experts_per_tok", 2), scoring="softmax", renormalize=True),
            expert=ExpertsSpec(activation=text.choice("hidden_act", {"silu": "silu"}, "silu")),
        )
        return shared.decoder(text, epsilon=1e-5, tied=tied, rope=rope, layer=lambda _: LayerConfig(attention, moe))

    def weights(self, model: str, head: str) -> shared.Weights:
        experts = Experts(f"{model}layers.{{i}}.mlp.experts", per_expert=True)
        return {**shared.decoder_weights(experts, model), "decoder.head": head}
