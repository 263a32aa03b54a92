"""DeepSeek-V3: latent attention, sigmoid routing with a correction bias and expert groups, shared experts.

Source: transformers 5.24 `models/deepseek_v3`. Checkpoints: deepseek-ai/DeepSeek-V3, -R1, -V3.1; Kimi-K2-Instruct and
-Thinking of moonshotai, whose config.json has another model_type beside the architecture DeepseekV3ForCausalLM.
"""

from typing import ClassVar

from moevlm.export.config import DecoderConfig
from moevlm.export.families import shared
from moevlm.export.families.fields import Fields
from moevlm.export.families.rope import one_axis, rope_fields
from moevlm.export.families.splitting import KIMI
from moevlm.export.families.text.alone import register_alone
from moevlm.export.families.text.base import register_text
from moevlm.export.families.text.grouped import grouped_experts
from moevlm.export.families.text.latent import HeadSizes, LatentText, latent_decoder, score_scale


@register_alone("kimi_k2", "Kimi-K2-Instruct", "Kimi-K2-Thinking")
@register_alone("deepseek_v3", "DeepSeek-V3", "DeepSeek-R1", "DeepSeek-V3.1")
@register_text("kimi_k2")
@register_text("deepseek_v3")
class DeepseekV3(LatentText):
    """See the module's docstring."""

    mixer = "MLA, scaled rope"
    routing = "sigmoid, correction bias, groups; shared experts"
    splitting = KIMI  # DeepSeek's own checkpoints have a tokenizer.json
    eos = (1,)
    # The layer behind the last one, which predicts a second token.
    left_out: ClassVar = {r"model\.layers\.61\..*": shared.NEXT_TOKENS}

    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        sizes, rope = HeadSizes.of(text), rope_fields(text)
        text.choice("head_dim", (sizes.rope,), sizes.rope)
        text.choice("topk_method", ("noaux_tc",), "noaux_tc")
        return latent_decoder(
            text,
            tied=tied,
            rope=one_axis(text, sizes.rope, rope=rope),
            scale=score_scale(rope, sizes.query),
            moe=grouped_experts(text, "sigmoid", groups=8, chosen_groups=4, scale=2.5),
            kv_heads=128,
            q_rank=1536,
        )
