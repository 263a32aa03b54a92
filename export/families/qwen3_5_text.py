"""The decoder of Qwen3.5 and Qwen3.6: layers of the gated delta rule and of gated GQA, whatever feeds forward.

Source: transformers 5.24 `models/qwen3_5`: Qwen3_5TextConfig and Qwen3_5TextModel.
"""

from moevlm.export.config import DecoderConfig, GatedDeltaConfig, GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.convolutions import depthwise
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import mrope
from moevlm.export.families.sources import exponential, halves_of_heads, plus_one
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import RopeMetadata

_KINDS = ("linear_attention", "full_attention")


def qwen3_5_rope(text: Fields) -> RopeMetadata:
    """On three axes."""
    head_dim = text.positive("head_dim", 256)
    return mrope(text, head_dim, interleaved=True, default_sections=(11, 11, 10), default_partial=0.25)


def qwen3_5_decoder(text: Fields, tied: bool, feed_forward: MLPConfig | MoEConfig, rope: RopeMetadata) -> DecoderConfig:
    """The decoder of a text's fields. tied: the head is the embedding. feed_forward: of every layer."""
    head_dim = text.positive("head_dim", 256)
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


def qwen3_5_dense(text: Fields) -> MLPConfig:
    """A feed-forward layer without experts."""
    return MLPConfig(text.positive("intermediate_size"), activation(text))


def qwen3_5_experts(text: Fields, renormalize: bool) -> MoEConfig:
    """A feed-forward layer of experts. renormalize: the weights of the chosen ones are divided by their sum."""
    return MoEConfig(
        experts=text.aliased("num_experts", "num_local_experts"),
        width=text.positive("moe_intermediate_size"),
        router=RouterSpec(top_k=text.positive("num_experts_per_tok"), scoring="softmax", renormalize=renormalize),
        expert=ExpertsSpec(activation=activation(text)),
        shared_width=text.positive("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def activation(text: Fields) -> str:
    """Of feed-forward layers, and of the convolution before the delta rule."""
    found: str = text.choice("hidden_act", {"silu": "silu"})
    return found


def qwen3_5_text_weights(model: str, per_expert: bool = False) -> shared.Weights:
    """Of the whole decoder, with experts or without. model: the prefix of all. per_expert: as in `Experts`."""
    ours, mlp = "decoder.layers.{i}.feed_forward.", f"{model}layers.{{i}}.mlp."
    return {
        **shared.decoder_weights(Experts(f"{mlp}experts", per_expert), model),
        **_norms_and_mixers(model),
        **shared.renamed({f"{ours}shared.{part}": f"{mlp}shared_expert.{part}_proj" for part in shared.GATED}),
        **shared.renamed({f"{ours}shared_gate": f"{mlp}shared_expert_gate"}),
    }


def _norms_and_mixers(model: str) -> shared.Weights:
    """Norms' gains are stored as their difference from 1, but for the one behind the delta rule."""
    layer, theirs = "decoder.layers.{i}.", f"{model}layers.{{i}}."
    mixer, attention, delta = f"{layer}attention.", f"{theirs}self_attn.", f"{theirs}linear_attn."
    return {
        "decoder.norm.weight": plus_one(f"{model}norm.weight"),
        f"{layer}attention_norm.weight": plus_one(f"{theirs}input_layernorm.weight"),
        f"{layer}feed_forward_norm.weight": plus_one(f"{theirs}post_attention_layernorm.weight"),
        **{f"{mixer}{norm}.weight": plus_one(f"{attention}{norm}.weight") for norm in ("q_norm", "k_norm")},
        **{
            f"{mixer}{ours}.{kind}": halves_of_heads(f"{attention}q_proj.{kind}", f"{attention}q_norm.weight", part)
            for part, ours in enumerate(("q", "gate"))
            for kind in shared.BOTH
        },
        **shared.renamed({f"{mixer}{part}": f"{delta}in_proj_{part}" for part in ("qkv", "z", "a", "b")}),
        **shared.renamed({f"{mixer}norm": f"{delta}norm", f"{mixer}delta_out": f"{delta}out_proj"}),
        f"{mixer}conv": depthwise(f"{delta}conv1d.weight"),
        f"{mixer}rate": exponential(f"{delta}A_log"),
        f"{mixer}dt_bias": f"{delta}dt_bias",
    }
