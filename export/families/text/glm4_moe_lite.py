"""GLM-4.7-Flash: DeepSeek-V3's attention with experts of GLM-4.5.

Source: transformers 5.24 `models/glm4_moe_lite`. Checkpoint: zai-org/GLM-4.7-Flash.
"""

from typing import ClassVar

from moevlm.export.config import DecoderConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis, rope_fields
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import register_text
from moevlm.export.families.text.grouped import grouped_experts
from moevlm.export.families.text.latent import HeadSizes, LatentText, latent_decoder, score_scale


@register_alone("glm4_moe_lite", "GLM-4.7-Flash")
@register_text("glm4_moe_lite")
class Glm4MoeLite(LatentText):
    """See the module's docstring."""

    mixer = "MLA, scaled rope"
    routing = "sigmoid, correction bias, groups; shared experts"
    eos = (1,)
    # The layer behind the last one, which predicts a second token.
    left_out: ClassVar = {r"model\.layers\.47.*": shared.NEXT_TOKENS}

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        sizes, rope, layers = HeadSizes.of(text), rope_fields(text), text.positive("num_hidden_layers")
        text.choice("head_dim", (sizes.rope,), sizes.rope)
        text.choice("topk_method", ("noaux_tc",), "noaux_tc")
        text.get("first_k_dense_replace", None)  # the reference does not read it
        kinds = text.each("mlp_layer_types", ("dense", "sparse"), ("dense", *("sparse",) * (layers - 1)))
        return latent_decoder(
            text,
            tied=tied,
            rope=one_axis(text, sizes.rope, rope=rope),
            scale=score_scale(rope, sizes.query),
            moe=grouped_experts(text, "sigmoid", scale=1.8),
            sparse=[kind == "sparse" for kind in kinds],
            epsilon=1e-5,
            kv_heads=20,
            q_rank=768,
        )
