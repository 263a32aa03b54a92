"""Llama 4: chunked attention with rope, each fourth layer without rope to all, experts whose input the router scales.

Source: transformers 5.24 `models/llama4`. Checkpoints: meta-llama/Llama-4-Scout-17B-16E, ...-Maverick-17B-128E, also
without their tower; facebook/MobileLLM-R1, which has no experts.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MLPConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.sources import halves, ones, reordered
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.manifest import QueryScaleMetadata

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_CHUNKED, _FULL = "chunked_attention", "full_attention"


@register_alone("llama4_text", "Llama-4-Scout and -Maverick without a tower", "MobileLLM-R1-950M")
@register_text("llama4_text")
class Llama4Text(TextModel):
    """See the module's docstring.

    Queries and keys turn in pairs of neighbours: their rows are read as halves, also where nothing turns, as a product
    of a query and a key does not know the order of its terms. They are normed behind the rotation there, and before it
    here: a norm without a gain divides a head by its length, which no rotation changes.
    """

    mixer = "GQA in chunks, each fourth layer to all without rope"
    routing = "sigmoid of the best, on the expert's input; shared expert"
    eos = (2,)
    router_suffix = "feed_forward.router"
    config_names: ClassVar = {"experts": "num_local_experts", "width of experts": "intermediate_size"}

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim

    @classmethod
    def of(cls, text: Fields) -> Self:
        return cls(text.positive("head_dim", 128))

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        layers = text.positive("num_hidden_layers")
        turning = self._turning(text, layers)
        scaled = text.choice("attn_temperature_tuning", {True: True, 4: True, False: False}, True)
        scale = QueryScaleMetadata(
            beta=text.number("attn_scale", 0.1), original=text.positive("floor_scale", 8192), offset=1
        )
        feed_forward = self._feed_forward(text, layers)
        return DecoderConfig(
            vocabulary=text.positive("vocab_size"),
            hidden=text.positive("hidden_size"),
            context=text.positive("max_position_embeddings"),
            epsilon=text.number("rms_norm_eps", 1e-5),
            tied_head=tied,
            ropes=(one_axis(text, text.positive("head_dim", 128)),),
            layers=tuple(
                LayerConfig(self._attention(text, turns, chunk, scaled), part)
                for turns, chunk, part in zip(turning, self._chunks(text, turning), feed_forward, strict=True)
            ),
            query_scale=scale if scaled and not all(turning) else None,
        )

    def weights(self, model: str, head: str) -> shared.Weights:
        ours, theirs = "decoder.layers.{i}.", f"{model}layers.{{i}}."
        order = halves(self._head_dim)
        return {
            **shared.decoder_weights(Experts(f"{theirs}feed_forward.experts", per_expert=False), model),
            "decoder.head": head,
            **{
                f"{ours}attention.{part}.{kind}": reordered(f"{theirs}self_attn.{part}_proj.{kind}", order)
                for part in "qk"
                for kind in shared.BOTH
            },
            **{f"{ours}attention.{norm}.weight": ones for norm in ("q_norm", "k_norm")},
            **shared.renamed({f"{ours}feed_forward.router": f"{theirs}feed_forward.router"}),
            **shared.renamed(
                {
                    f"{ours}feed_forward.{part}{name}": f"{theirs}feed_forward.{of_theirs}{name}_proj"
                    for part, of_theirs in (("", ""), ("shared.", "shared_expert."))
                    for name in shared.GATED
                }
            ),
        }

    def routed(self, returned: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
        scores, logits = returned  # scores of experts that are not chosen are 0
        return logits, scores.topk(int((scores > 0).sum(1).max())).indices

    def mend(self, model: "PreTrainedModel") -> None:
        def embed(text: Any, arguments: tuple[()], options: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            """Where the embedding is in memory only while it runs, the ids would be sent to the meta device."""
            return arguments, options | {"input_ids": None, "inputs_embeds": text.embed_tokens(options["input_ids"])}

        model.get_submodule("model").register_forward_pre_hook(embed, with_kwargs=True)

    def _attention(self, text: Fields, turns: bool, chunk: int, scaled: bool) -> GQAConfig:
        bias = text.flag("attention_bias", False)
        return GQAConfig(
            heads=text.positive("num_attention_heads"),
            kv_heads=text.positive("num_key_value_heads", 8),
            head_dim=self._head_dim,
            rotary_dim=self._head_dim if turns else 0,
            qk_norm=text.flag("use_qk_norm", True) and turns,
            qkv_bias=bias,
            out_bias=bias,
            query_scale=scaled and not turns,
            chunk=chunk,
        )

    def _turning(self, text: Fields, layers: int) -> list[bool]:
        """Which layers rotate queries and keys: those with a 1 in no_rope_layers."""
        every = text.positive("no_rope_layer_interval", 4)
        said = text.counts("no_rope_layers", ())
        if not said:
            return [(i + 1) % every != 0 for i in range(layers)]
        if len(said) < layers or max(said) > 1:
            raise text.invalid("no_rope_layers", list(said), f"{layers} times 0 or 1")
        return [turns == 1 for turns in said[:layers]]

    def _chunks(self, text: Fields, turning: list[bool]) -> list[int]:
        """The size of each layer's chunks; 0 for one that sees all."""
        size = 0 if text.is_null("attention_chunk_size") else text.positive("attention_chunk_size", 8192)
        allowed = (_CHUNKED, _FULL) if size else (_FULL,)
        usual = tuple(_CHUNKED if size and turns else _FULL for turns in turning)
        return [size if kind == _CHUNKED else 0 for kind in text.each("layer_types", allowed, usual)]

    def _sparse(self, text: Fields, layers: int) -> Collection[int]:
        """Numbers of the layers with experts."""
        if "moe_layers" in text:
            text.get("interleave_moe_layer_step", None)
            return [i for i in text.counts("moe_layers") if i < layers]
        step = text.positive("interleave_moe_layer_step", 1)
        return range(step - 1, layers, step)

    def _feed_forward(self, text: Fields, layers: int) -> list[MLPConfig | MoEConfig]:
        """Of each layer."""
        activation, sparse = text.choice("hidden_act", {"silu": "silu"}, "silu"), self._sparse(text, layers)
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
