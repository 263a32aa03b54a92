"""Qwen3.5 MoE, Qwen3.6: three layers of the gated delta rule to one of gated GQA, a gated shared expert, norms 1 + w.

Source: transformers 5.24 `models/qwen3_5_moe`.
"""

from typing import ClassVar

from moevlm.export.config import (
    DecoderConfig,
    GatedDeltaConfig,
    GQAConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from moevlm.export.families import qwen_vision, shared
from moevlm.export.families.about import About
from moevlm.export.families.base import LEFT_OUT, Family, register
from moevlm.export.families.convolutions import depthwise
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import mrope
from moevlm.export.families.sources import exponential, halves_of_heads, plus_one
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

_MODEL = "model.language_model."
_OURS, _LAYER = "decoder.layers.{i}.", f"{_MODEL}layers.{{i}}."
_ATTENTION, _DELTA, _MLP = f"{_LAYER}self_attn.", f"{_LAYER}linear_attn.", f"{_LAYER}mlp."
_DELTA_PARTS = {"norm": "norm", "delta_out": "out_proj"}
_KINDS = ("linear_attention", "full_attention")


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
        **shared.decoder_weights(Experts(f"{_MLP}experts", per_expert=False), _MODEL),
        "decoder.norm.weight": plus_one(f"{_MODEL}norm.weight"),
        f"{_OURS}attention_norm.weight": plus_one(f"{_LAYER}input_layernorm.weight"),
        f"{_OURS}feed_forward_norm.weight": plus_one(f"{_LAYER}post_attention_layernorm.weight"),
        **{f"{_OURS}attention.{n}.weight": plus_one(f"{_ATTENTION}{n}.weight") for n in ("q_norm", "k_norm")},
        **{
            f"{_OURS}attention.{ours}.{kind}": halves_of_heads(
                f"{_ATTENTION}q_proj.{kind}", f"{_ATTENTION}q_norm.weight", part
            )
            for part, ours in enumerate(("q", "gate"))
            for kind in shared.BOTH
        },
        **shared.renamed({f"{_OURS}attention.{p}": f"{_DELTA}in_proj_{p}" for p in ("qkv", "z", "a", "b")}),
        **shared.renamed({f"{_OURS}attention.{ours}": f"{_DELTA}{p}" for ours, p in _DELTA_PARTS.items()}),
        f"{_OURS}attention.conv": depthwise(f"{_DELTA}conv1d.weight"),
        f"{_OURS}attention.rate": exponential(f"{_DELTA}A_log"),
        f"{_OURS}attention.dt_bias": f"{_DELTA}dt_bias",
        **shared.renamed({f"{_OURS}feed_forward.shared.{p}": f"{_MLP}shared_expert.{p}_proj" for p in shared.GATED}),
        **shared.renamed({f"{_OURS}feed_forward.shared_gate": f"{_MLP}shared_expert_gate"}),
        **qwen_vision.weights("model.visual."),
    }

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        text.get("tie_word_embeddings", False)  # the outer field decides
        return ModelConfig(
            model_type=self.model_type,
            decoder=self._decoder(text, tied=fields.flag("tie_word_embeddings", False)),
            vision=qwen_vision.config(vision),
            video=shared.video(fields, "vision_start_token_id", "vision_end_token_id"),
            **shared.token_ids(fields, text),
        )

    def _decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        head_dim, feed_forward = text.positive("head_dim", 256), self.feed_forward(text)
        rope = mrope(text, head_dim, interleaved=True, default_sections=(11, 11, 10), default_partial=0.25)
        text.choice("attn_output_gate", (True,), True)
        text.choice("output_gate_type", ("swish", "silu"), "swish")
        bias = text.flag("attention_bias", False)
        attention = GQAConfig(
            heads=text.positive("num_attention_heads"),
            kv_heads=text.positive("num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=rope.dim,
            qk_norm=True,
            qkv_bias=bias,
            out_bias=bias,
            output_gate=True,
        )
        delta = GatedDeltaConfig(
            key_heads=text.positive("linear_num_key_heads"),
            value_heads=text.positive("linear_num_value_heads"),
            key_dim=text.positive("linear_key_head_dim"),
            value_dim=text.positive("linear_value_head_dim"),
            kernel=text.positive("linear_conv_kernel_dim"),
        )
        interval, layers = text.positive("full_attention_interval", 4), text.positive("num_hidden_layers")
        usual = tuple(_KINDS[(i + 1) % interval == 0] for i in range(layers))
        kinds = text.each("layer_types", _KINDS, usual)
        if "full_attention" not in kinds:  # engines keep pages of some layer
            raise text.invalid("layer_types", list(kinds), "one full_attention or more")
        mixers = dict(zip(_KINDS, (delta, attention), strict=True))
        return shared.decoder(
            text, epsilon=1e-6, tied=tied, rope=rope, layer=lambda i: LayerConfig(mixers[kinds[i]], feed_forward)
        )

    def feed_forward(self, text: Fields) -> MLPConfig | MoEConfig:
        """Of every layer."""
        text.choice("norm_topk_prob", (True,), True)
        return MoEConfig(
            experts=text.aliased("num_experts", "num_local_experts"),
            width=text.positive("moe_intermediate_size"),
            router=RouterSpec(top_k=text.positive("num_experts_per_tok"), scoring="softmax", renormalize=True),
            expert=ExpertsSpec(activation=activation(text)),
            shared_width=text.positive("shared_expert_intermediate_size"),
            shared_gate=True,
        )


def activation(text: Fields) -> str:
    """Of feed-forward layers, and of the convolution before the delta rule."""
    found: str = text.choice("hidden_act", {"silu": "silu"})
    return found
