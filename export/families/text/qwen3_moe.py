"""Qwen3 MoE: GQA with per-head q/k norm, softmax top-k routing.

Source: transformers 5.24 `models/qwen3_moe`. Checkpoints: Qwen/Qwen3-30B-A3B, ...-235B-A22B, Qwen3-Coder.
"""

from collections.abc import Mapping

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import RopeMetadata


@register_alone("qwen3_moe", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-30B-A3B")
@register_text("qwen3_moe")
class Qwen3Moe(TextModel):
    """See the module's docstring."""

    mixer = "GQA with q/k norms"
    routing = "softmax, renormalised"
    router_suffix = "mlp.gate"

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        text.get("sliding_window", None)  # of no use without use_sliding_window
        text.choice("use_qk_norm", (True,), True)  # of Qwen3-Coder; transformers does not ask
        rope = one_axis(text, shared.head_dim(text))
        usual = {"num_key_value_heads": 4, "intermediate_size": 6144}
        return qwen3_decoder(text, tied=tied, rope=rope, renormalize=text.flag("norm_topk_prob", False), usual=usual)

    def weights(self, model: str, head: str) -> shared.Weights:
        experts = Experts(f"{model}layers.{{i}}.mlp.experts", per_expert=True)
        return {**shared.decoder_weights(experts, model), "decoder.head": head}


def qwen3_decoder(
    text: Fields, *, tied: bool, rope: RopeMetadata, renormalize: bool, usual: Mapping[str, int], deepstack: int = 0
) -> DecoderConfig:
    """The decoder of Qwen3 MoE and of Qwen3-VL-MoE.

    usual: fields that config.json may leave out. deepstack: visual levels added after the first layers.
    """
    activation = text.choice("hidden_act", {"silu": "silu"})
    text.choice("use_sliding_window", (False,), False)
    text.get("max_window_layers", None)  # how many layers would have a window
    bias = text.flag("attention_bias", False)
    attention = GQAConfig(
        heads=text.positive("num_attention_heads"),
        kv_heads=text.positive("num_key_value_heads", usual["num_key_value_heads"]),
        head_dim=shared.head_dim(text),
        rotary_dim=rope.dim,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
    )
    moe = MoEConfig(
        experts=text.aliased("num_experts", "num_local_experts"),
        width=text.positive("moe_intermediate_size"),
        router=RouterSpec(top_k=text.positive("num_experts_per_tok"), scoring="softmax", renormalize=renormalize),
        expert=ExpertsSpec(activation=activation),
    )
    dense = MLPConfig(text.positive("intermediate_size", usual["intermediate_size"]), activation)
    dense_layers, step = text.counts("mlp_only_layers", ()), text.positive("decoder_sparse_step", 1)
    shared.all_attend(text)
    return shared.decoder(
        text,
        epsilon=1e-6,
        tied=tied,
        rope=rope,
        layer=lambda i: LayerConfig(attention, dense if i in dense_layers or (i + 1) % step else moe),
        deepstack=deepstack,
    )
