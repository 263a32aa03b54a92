"""The decoder of Gemma 4: fields of its layers; a full one has other heads and another rope than a sliding one.

Source: transformers 5.24 `models/gemma4`: Gemma4TextConfig and Gemma4TextModel.
"""

from typing import TYPE_CHECKING

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.sources import rooted
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import RopeMetadata

if TYPE_CHECKING:
    from torch import Tensor

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def gemma4_decoder(text: Fields, tied: bool, visual: bool = True) -> DecoderConfig:
    """The decoder of a text's fields. tied: the head is the embedding. visual: there may be images."""
    hidden, layers = text.positive("hidden_size"), text.positive("num_hidden_layers")
    text.choice("hidden_size_per_layer_input", (0,), 256)
    text.choice("num_kv_shared_layers", (0,), 0)
    for key in ("vocab_size_per_layer_input", "use_double_wide_mlp"):  # of no use without those
        text.get(key, None)
    usual = tuple(_FULL if i % 6 == 5 else _SLIDING for i in range(layers))
    kinds = [*text.each("layer_types", (_SLIDING, _FULL), usual)[:-1], _FULL]  # the last one always is
    ropes, attention = _attention(text, kinds, visual)
    feed_forward = _feed_forward(text)
    softcap = "final_logit_softcapping"
    return DecoderConfig(
        vocabulary=text.positive("vocab_size"),
        hidden=hidden,
        context=text.positive("max_position_embeddings"),
        epsilon=text.number("rms_norm_eps", 1e-6),
        tied_head=tied,
        ropes=ropes,
        layers=tuple(LayerConfig(attention[kind], feed_forward, "sandwich", scaled=True) for kind in kinds),
        embedding_scale=hidden**0.5,  # in bfloat16, transformers rounds it to 8 bits
        logit_softcap=text.number(softcap) if softcap in text else 0.0,
    )


def _attention(text: Fields, kinds: list[str], visual: bool) -> tuple[tuple[RopeMetadata, ...], dict[str, GQAConfig]]:
    """The rope of each kind of layer that there is, and its attention."""
    bias, keyed = text.flag("attention_bias", False), text.flag("attention_k_eq_v", False)
    window, images = text.positive("sliding_window", 512), "use_bidirectional_attention"
    bidirectional = images in text and text.choice(images, ("vision",)) == "vision" and visual
    rope, heads = text.sub("rope_parameters", _ROPES), _heads(text, kinds, keyed)
    ropes = tuple(one_axis(text, head_dim, rope=rope.sub(kind, nulls=False)) for kind, (head_dim, _) in heads.items())
    rope.get(_SLIDING, None)  # there may be no such layer
    return ropes, {
        kind: GQAConfig(
            heads=text.positive("num_attention_heads", 8),
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=head_dim,
            qk_norm=True,
            qkv_bias=bias,
            out_bias=bias,
            rope=group,
            window=window if kind == _SLIDING else 0,
            scale=1.0,
            value_norm=True,
            value_is_key=keyed and kind == _FULL,
            bidirectional_images=bidirectional and kind == _SLIDING,
        )
        for group, (kind, (head_dim, kv_heads)) in enumerate(heads.items())
    }


def _heads(text: Fields, kinds: list[str], keyed: bool) -> dict[str, tuple[int, int]]:
    """head_dim and kv_heads of each kind of layer; transformers 5.24 writes them layer by layer."""
    head_dim, kv_heads = text.positive("head_dim", 256), text.positive("num_key_value_heads", 4)
    wide, few = text.positive("global_head_dim", 512), text.positive("num_global_key_value_heads", kv_heads, kv_heads)
    if "per_layer_config" not in text:
        found = {_SLIDING: (head_dim, kv_heads), _FULL: (wide, few if keyed else kv_heads)}
        return {kind: found[kind] for kind in sorted(set(kinds), reverse=True)}
    own, sizes = text.sub("per_layer_config"), dict[str, tuple[int, int]]()
    for i, kind in enumerate(kinds):
        key = str(i) if str(i) in own else str(i).zfill(len(str(len(kinds) - 1)))
        layer = own.sub(key, {})
        size = layer.positive("head_dim", head_dim), layer.positive("num_key_value_heads", kv_heads)
        if sizes.setdefault(kind, size) != size:
            raise own.invalid(key, list(size), f"heads like those of other layers of {kind}: {list(sizes[kind])}")
    return sizes


def _feed_forward(text: Fields) -> MLPConfig | MoEConfig:
    width = text.positive("intermediate_size", 9216)
    activation = text.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh")
    if not text.flag("enable_moe_block", False):
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            text.get(key, None)
        return MLPConfig(width, activation)
    return MoEConfig(
        experts=text.positive("num_experts"),
        width=text.positive("moe_intermediate_size"),
        router=RouterSpec(top_k=text.positive("top_k_experts")),
        expert=ExpertsSpec(activation=activation),
        expert_scale=True,
        dense_width=width,
    )


def gemma4_weights(model: str) -> shared.Weights:
    """Of the whole decoder. model: the prefix of all."""
    ours, theirs = "decoder.layers.{i}.", f"{model}layers.{{i}}."
    return {
        **shared.decoder_weights(Experts(f"{theirs}experts", per_expert=False), model),
        **shared.renamed(
            {
                f"{ours}{name}": f"{theirs}{their_name}"
                for name, their_name in {
                    "attention_post_norm": "post_attention_layernorm",
                    "feed_forward_norm": "pre_feedforward_layernorm",
                    "feed_forward_post_norm": "post_feedforward_layernorm",
                    "feed_forward.mlp_norm": "pre_feedforward_layernorm",
                    "feed_forward.mlp_post_norm": "post_feedforward_layernorm_1",
                    "feed_forward.experts_norm": "pre_feedforward_layernorm_2",
                    "feed_forward.experts_post_norm": "post_feedforward_layernorm_2",
                    "feed_forward.router": "router.proj",
                    **{f"feed_forward.mlp.{part}": f"mlp.{part}_proj" for part in shared.GATED},
                }.items()
            }
        ),
        f"{ours}feed_forward.router_norm.weight": rooted(f"{theirs}router.scale", -1),
        f"{ours}feed_forward.expert_scale": f"{theirs}router.per_expert_scale",
        f"{ours}scale": f"{theirs}layer_scalar",
    }


def gemma4_logits(probabilities: "Tensor") -> "Tensor":
    """Of a router that returns [T, E] probabilities: the softmax of their logarithms."""
    return probabilities.clamp(min=2.0**-126).log()
