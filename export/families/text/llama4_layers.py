"""Which layers of Llama 4 turn queries and keys, see chunks, scale queries by their place, and have experts.

Source: transformers 5.24 `models/llama4`: Llama4TextConfig and Llama4TextDecoderLayer.
"""

from collections.abc import Collection

from moevlm.export.config import GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families.fields import Fields
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

_CHUNKED, _FULL = "chunked_attention", "full_attention"


def llama4_layers(text: Fields, head_dim: int) -> list[LayerConfig]:
    """The layers of a text's fields, in order."""
    turning = _turning(text, text.positive("num_hidden_layers"))
    scaled = text.choice("attn_temperature_tuning", {True: True, 4: True, False: False}, True)
    feed_forward = _feed_forward(text, len(turning))
    return [
        LayerConfig(_attention(text, head_dim, turns, chunk, scaled), part)
        for turns, chunk, part in zip(turning, _chunks(text, turning), feed_forward, strict=True)
    ]


def _attention(text: Fields, head_dim: int, turns: bool, chunk: int, scaled: bool) -> GQAConfig:
    bias = text.flag("attention_bias", False)
    return GQAConfig(
        heads=text.positive("num_attention_heads"),
        kv_heads=text.positive("num_key_value_heads", 8),
        head_dim=head_dim,
        rotary_dim=head_dim if turns else 0,
        qk_norm=text.flag("use_qk_norm", True) and turns,
        qkv_bias=bias,
        out_bias=bias,
        query_scale=scaled and not turns,
        chunk=chunk,
    )


def _turning(text: Fields, layers: int) -> list[bool]:
    """Which layers rotate queries and keys: those with a 1 in no_rope_layers."""
    every = text.positive("no_rope_layer_interval", 4)
    said = text.counts("no_rope_layers", ())
    if not said:
        return [(i + 1) % every != 0 for i in range(layers)]
    if len(said) < layers or max(said) > 1:
        raise text.invalid("no_rope_layers", list(said), f"{layers} times 0 or 1")
    return [turns == 1 for turns in said[:layers]]


def _chunks(text: Fields, turning: list[bool]) -> list[int]:
    """The size of each layer's chunks; 0 for one that sees all."""
    size = 0 if text.is_null("attention_chunk_size") else text.positive("attention_chunk_size", 8192)
    allowed = (_CHUNKED, _FULL) if size else (_FULL,)
    usual = tuple(_CHUNKED if size and turns else _FULL for turns in turning)
    return [size if kind == _CHUNKED else 0 for kind in text.each("layer_types", allowed, usual)]


def _sparse(text: Fields, layers: int) -> Collection[int]:
    """Numbers of the layers with experts."""
    if "moe_layers" in text:
        text.get("interleave_moe_layer_step", None)
        return [i for i in text.counts("moe_layers") if i < layers]
    step = text.positive("interleave_moe_layer_step", 1)
    return range(step - 1, layers, step)


def _feed_forward(text: Fields, layers: int) -> list[MLPConfig | MoEConfig]:
    """Of each layer."""
    activation, sparse = text.choice("hidden_act", {"silu": "silu"}, "silu"), _sparse(text, layers)
    dense = MLPConfig(text.positive("intermediate_size_mlp", 16384), activation)
    if not sparse:
        for name in ("num_local_experts", "num_experts_per_tok", "intermediate_size"):
            text.get(name, None)
        return [dense] * layers
    width = text.positive("intermediate_size", 8192)
    moe = MoEConfig(
        experts=text.positive("num_local_experts", 16),
        width=width,
        router=RouterSpec(top_k=text.positive("num_experts_per_tok", 1), scoring="sigmoid", renormalize=False),
        expert=ExpertsSpec(activation=activation, weight_on="input"),
        shared_width=width,
    )
    return [moe if i in sparse else dense for i in range(layers)]
