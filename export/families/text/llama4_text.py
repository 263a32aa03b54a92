"""Llama 4: chunked attention with rope, each fourth layer without rope to all, experts whose input the router scales.

Source: transformers 5.24 `models/llama4`. Checkpoints: meta-llama/Llama-4-Scout-17B-16E, ...-Maverick-17B-128E, also
without their tower; facebook/MobileLLM-R1, which has no experts.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Self

from moevlm.export.config import DecoderConfig
from moevlm.export.families import shared
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis
from moevlm.export.families.sources import halves, ones, reordered
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import TextModel, register_text
from moevlm.export.families.text.llama4_layers import llama4_layers
from moevlm.runtime.core.manifest import QueryScaleMetadata

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@register_alone("llama4_text", "Llama-4-Scout and -Maverick without a tower", "MobileLLM-R1-950M")
@register_text("llama4_text")
class Llama4Text(TextModel):
    """See the module's docstring.

    Queries and keys turn in pairs of neighbours: their rows are read as halves, also where nothing turns, as a product
    of a query and a key does not know the order of its terms. They are normed behind the rotation there, and before it
    here: a norm without a gain divides a head by its length, which no rotation changes. A factor on cosine and sine
    does, and is refused beside these norms.
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
        head_dim = text.positive("head_dim", 128)
        layers, rope = llama4_layers(text, head_dim), one_axis(text, head_dim)
        if rope.factor != 1 and text.flag("use_qk_norm", True):
            told = f"false where cosine and sine have a factor, here {rope.factor:.6g}, which these norms would undo"
            raise text.invalid("use_qk_norm", True, told)
        scaled = any(layer.mixer.scales_queries for layer in layers)
        scale = QueryScaleMetadata(
            beta=text.number("attn_scale", 0.1), original=text.positive("floor_scale", 8192), offset=1
        )
        return shared.decoder(
            text,
            epsilon=1e-5,
            tied=tied,
            rope=rope,
            layer=lambda i: layers[i],
            query_scale=scale if scaled else None,
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
