"""Gemma 4: sliding and full layers of different heads, sandwich norms, experts beside a dense layer, capped logits.

Source: transformers 5.24 `models/gemma4`. Checkpoint: google/gemma-4-26B-A4B-it, and dense ones without per-layer
embeddings. Audio is left out.
"""

from typing import TYPE_CHECKING, ClassVar

from moevlm.export.config import ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import LEFT_OUT, Family, register
from moevlm.export.families.fields import Fields
from moevlm.export.families.gemma4_text import gemma4_decoder, gemma4_logits, gemma4_weights
from moevlm.export.families.gemma4_vision import GEMMA4_TOWER, gemma4_tower, image_marks
from moevlm.export.families.text.gemma4_text import Gemma4Text

if TYPE_CHECKING:
    from torch import Tensor


@register("gemma4")
class Gemma4(Family):
    """See the module's docstring."""

    about = About(
        checkpoints=("Gemma-4-26B-A4B", "Gemma-4-31B"),
        mixer=Gemma4Text.mixer,
        routing=Gemma4Text.routing,
        vision="packed grid, pooled; an image's tokens see each other",
    )
    router_suffix = ".router"
    config_names: ClassVar = {
        "head_dim without a window": "text_config.global_head_dim",
        "image_begin": "boi_token_id",
        "image_end": "eoi_token_id",
        "rotary_dim": "text_config.head_dim",
        "top_k": "text_config.top_k_experts",
    }
    left_out: ClassVar = {**LEFT_OUT, **dict.fromkeys((r"audio_tower\.", r"embed_audio\."), shared.AUDIO)}
    weights: ClassVar[shared.Weights] = {
        **gemma4_weights("model.language_model."),
        **GEMMA4_TOWER,
    }

    def routed(self, returned: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
        probabilities, index = super().routed(returned)
        return gemma4_logits(probabilities), index

    def translate(self, fields: Fields) -> ModelConfig:
        text = fields.sub("text_config")
        for key in ("audio_config", "vision_soft_tokens_per_image"):  # the image processor knows how many tokens
            fields.get(key, None)
        text.get("tie_word_embeddings", None)  # the outer field decides
        decoder = gemma4_decoder(text, fields.flag("tie_word_embeddings", True))
        return ModelConfig(
            model_type="gemma4",
            decoder=decoder,
            vision=gemma4_tower(fields.sub("vision_config"), decoder.hidden),
            **shared.token_ids(fields, text, (1,)),
            image_marks=image_marks(fields),
        )
