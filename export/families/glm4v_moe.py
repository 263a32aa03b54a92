"""GLM-4.5V: sigmoid routing with a correction bias and expert groups, shared experts, dense first layers, partial rope.

Source: transformers 5.24 `models/glm4v_moe`. Checkpoint: zai-org/GLM-4.5V.
"""

from typing import ClassVar

from moevlm.export.config import DecoderConfig, ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import LEFT_OUT, Family, register
from moevlm.export.families.experts import Experts
from moevlm.export.families.fields import Fields
from moevlm.export.families.glm_vision import GLM_TOWER, glm_tower
from moevlm.export.families.rope import mrope
from moevlm.export.families.text.glm4_moe import NEXT_TOKENS, glm4_decoder


@register("glm4v_moe")
class Glm4vMoe(Family):
    """See the module's docstring."""

    about = About(
        checkpoints=("GLM-4.5V", "GLM-4.6V"),
        mixer="GQA, partial M-RoPE",
        routing="sigmoid, correction bias, groups; shared experts",
        vision="packed grid, gated merger",
    )
    router_suffix = "mlp.gate"
    config_names: ClassVar = {
        "experts": "text_config.n_routed_experts",
        "video_begin": "image_start_token_id",
        "video_end": "image_end_token_id",
    }
    left_out: ClassVar = {**LEFT_OUT, **NEXT_TOKENS}
    weights: ClassVar[shared.Weights] = {
        **shared.decoder_weights(Experts("model.language_model.layers.{i}.mlp.experts", per_expert=True)),
        **GLM_TOWER,
    }

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        tied = [part.flag("tie_word_embeddings", False) for part in (fields, text)]  # either will do
        return ModelConfig(
            model_type="glm4v_moe",
            decoder=self._decoder(text, any(tied)),
            vision=glm_tower(vision),
            video=shared.video(fields, "image_start_token_id", "image_end_token_id", token="image_token_id"),
            **shared.token_ids(fields, text),
        )

    def _decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        head_dim = shared.head_dim(text)
        rope = mrope(text, head_dim, interleaved=False, default_sections=(8, 12, 12), default_partial=0.5)
        text.choice("use_qk_norm", (False,), False)
        return glm4_decoder(text, tied=tied, rope=rope, bias=True, qk_norm=False)
