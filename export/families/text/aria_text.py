"""The text model of Aria: GQA, softmax over the logits of the chosen experts, shared experts that always run.

Source: transformers 5.24 `models/aria`. Checkpoints: rhymes-ai/Aria, whose experts are called fc1 and fc2 and lie as in
transformers' model: [E, H, 2I] and [E, I, H], whatever the widths.
"""

from typing import ClassVar

from moevlm.export.config import DecoderConfig, GQAConfig, LayerConfig, MoEConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts, ExpertsPart
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.sources import FirstOf, Indices, Shape, Tensors
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.export.graph.rearranged import swap_last
from moevlm.export.graph.weights import Weight
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec


@register_text("aria_text")
class AriaText(TextModel):
    """See the module's docstring."""

    mixer = "GQA"
    routing = "softmax, renormalised; shared experts"
    eos = (2,)
    router_suffix = "mlp.router"
    config_names: ClassVar = {
        "experts": "moe_num_experts",
        "top_k": "moe_topk",
        "width of experts": "intermediate_size",
    }

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        rope, bias = one_axis(text, shared.head_dim(text)), text.flag("attention_bias", False)
        heads, width = text.positive("num_attention_heads"), text.positive("intermediate_size", 4096)
        text.choice("mlp_bias", (False,), False)
        attention = GQAConfig(
            heads=heads,
            kv_heads=text.positive("num_key_value_heads", heads, heads),
            head_dim=shared.head_dim(text),
            rotary_dim=rope.dim,
            qkv_bias=bias,
            out_bias=bias,
        )
        top_k = text.positive("moe_topk", 2)
        for key, value in (("num_experts_per_tok", top_k), ("moe_intermediate_size", width)):
            text.repeated(key, value)  # as published files have them
        moe = MoEConfig(
            experts=text.positive("moe_num_experts", 8),
            width=width,
            router=RouterSpec(top_k=top_k, scoring="softmax", renormalize=True),
            expert=ExpertsSpec(activation=text.choice("hidden_act", {"silu": "silu"}, "silu")),
            shared_width=width * text.positive("moe_num_shared_experts", 2),
        )
        return shared.decoder(text, epsilon=1e-6, tied=tied, rope=rope, layer=lambda _: LayerConfig(attention, moe))

    def weights(self, model: str, head: str) -> shared.Weights:
        ours, theirs = "decoder.layers.{i}.feed_forward.", f"{model}layers.{{i}}.mlp."
        return {
            **shared.decoder_weights(Experts(f"{theirs}experts", per_expert=False), model),
            **shared.renamed({f"{ours}router": f"{theirs}router"}),
            f"{ours}gate_up": _turned(f"{theirs}experts", "fc1.weight", "gate_up_proj"),
            f"{ours}down": _turned(f"{theirs}experts", "fc2.weight", "down_proj"),
            "decoder.head": head,
        }


def _turned(base: str, *names: str) -> ExpertsPart:
    """All experts of a layer under the first of these names that there is, their last two axes exchanged.

    An `expert_layout` other than "auto" decides.
    """
    stored = FirstOf(tuple(f"{base}.{name}" for name in names))

    def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        if layout == "out_in":
            return stored(tensors, indices, shape, layout)
        return swap_last(stored(tensors, indices, (shape[0], shape[2], shape[1]), layout))

    return ExpertsPart(base, source)
