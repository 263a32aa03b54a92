"""Mistral 4: latent attention, queries that grow with their place, softmax routing in groups, shared experts.

Source: transformers 5.24 `models/mistral4`. Checkpoint: the text of mistralai/Mistral-Small-4-119B-2603.
"""

from moevlm.export.config import DecoderConfig
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis, rope_fields
from moevlm.export.families.text.base import register_text
from moevlm.export.families.text.grouped import grouped_experts
from moevlm.export.families.text.latent import HeadSizes, LatentText, latent_decoder, score_scale
from moevlm.runtime.core.manifest import QueryScaleMetadata


@register_text("mistral4")
class Mistral4(LatentText):
    """See the module's docstring."""

    mixer = "MLA, yarn, queries scaled by their place"
    routing = "softmax, groups; shared experts"
    eos = (2,)

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        sizes, rope = HeadSizes.of(text), rope_fields(text)
        text.choice("head_dim", (sizes.query,), sizes.query)
        partial = sizes.rope / sizes.query
        rope.choice("partial_rotary_factor", (partial,), partial)
        rope.get("max_position_embeddings", None)  # the model's, once more
        return latent_decoder(
            text,
            tied=tied,
            rope=one_axis(text, sizes.query, rope=rope, default_partial=partial),
            scale=score_scale(rope, sizes.query),
            moe=grouped_experts(text, "softmax"),
            kv_heads=32,
            q_rank=1024,
            query_scale=QueryScaleMetadata(
                beta=rope.number("llama_4_scaling_beta"), original=rope.positive("original_max_position_embeddings")
            ),
        )
