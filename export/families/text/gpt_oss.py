"""gpt-oss: attention with sinks, every other layer in a window, yarn; clamped SwiGLU experts with biases.

Source: transformers 5.24 `models/gpt_oss`. Checkpoints: openai/gpt-oss-20b, ...-120b, their experts in MXFP4.
"""

from typing import ClassVar

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.interleaved_experts import InterleavedExperts
from moevlm.export.families.rope import one_axis
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

_SLIDING, _FULL = "sliding_attention", "full_attention"
# Where config.json says nothing of rope.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@register_alone("gpt_oss", "gpt-oss-20b", "gpt-oss-120b")
@register_text("gpt_oss")
class GptOss(TextModel):
    """See the module's docstring."""

    mixer = "GQA with sinks, in windows and to all, yarn"
    routing = "softmax of the chosen logits; biases everywhere"
    router_suffix = "mlp.router"
    config_names: ClassVar = {"experts": "num_local_experts", "width of experts": "intermediate_size"}

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        layers, head_dim = text.positive("num_hidden_layers"), text.positive("head_dim", 64)
        text.choice("hidden_act", ("silu",), "silu")
        text.get("initial_context_length", None)  # of another reader, as is the next
        top_k = text.positive("num_experts_per_tok", 4)
        text.choice("experts_per_token", (top_k,), top_k)
        usual = tuple(_FULL if i % 2 else _SLIDING for i in range(layers))
        bias, window = text.flag("attention_bias", True), text.positive("sliding_window", 128)
        rope = None if "rope_scaling" in text else text.sub("rope_parameters", _ROPE, nulls=False)
        attention = {
            kind: GQAConfig(
                heads=text.positive("num_attention_heads"),
                kv_heads=text.positive("num_key_value_heads", 8),
                head_dim=head_dim,
                rotary_dim=head_dim,
                qkv_bias=bias,
                out_bias=bias,
                window=window if kind == _SLIDING else 0,
                sinks=True,
            )
            for kind in (_SLIDING, _FULL)
        }
        moe = MoEConfig(
            experts=text.aliased("num_local_experts", "num_experts"),
            width=text.positive("intermediate_size"),
            router=RouterSpec(top_k, scoring="softmax_after_topk", renormalize=False),
            expert=ExpertsSpec(
                "swiglu_clamped", alpha=text.number("swiglu_alpha", 1.702), limit=text.number("swiglu_limit", 7.0)
            ),
            router_bias=True,
            expert_biases=True,
        )
        kinds = text.each("layer_types", (_SLIDING, _FULL), usual)
        return DecoderConfig(
            vocabulary=text.positive("vocab_size"),
            hidden=text.positive("hidden_size"),
            context=text.positive("max_position_embeddings", 131072),
            epsilon=text.number("rms_norm_eps", 1e-5),
            tied_head=tied,
            ropes=(one_axis(text, head_dim, rope=rope),),
            layers=tuple(LayerConfig(attention[kind], moe) for kind in kinds),
        )

    def weights(self, model: str, head: str) -> shared.Weights:
        ours, theirs = "decoder.layers.{i}.", f"{model}layers.{{i}}."
        experts = InterleavedExperts(f"{theirs}mlp.experts")
        return {
            **shared.decoder_weights(experts, model),
            "decoder.head": head,
            f"{ours}attention.sinks": f"{theirs}self_attn.sinks",
            **shared.renamed({f"{ours}feed_forward.router": f"{theirs}mlp.router"}, shared.BOTH),
            f"{ours}feed_forward.gate_up_bias": experts.gate_up_bias(),
            f"{ours}feed_forward.down_bias": experts.down_bias(),
        }
