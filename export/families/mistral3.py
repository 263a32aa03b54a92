"""Mistral 3: a Pixtral tower before a text model of Mistral, with a token behind each row of an image's tokens.

Source: transformers 5.24 `models/mistral3` and `models/pixtral`. Checkpoints: mistralai/Mistral-Small-4-119B-2603,
Ministral-3-3B, -8B, -14B.
"""

from typing import ClassVar

from moevlm.export.config import ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import register
from moevlm.export.families.fields import Fields
from moevlm.export.families.pixtral import PIXTRAL_TOWER, pixtral_tower
from moevlm.export.families.text.wrapper import Wrapper


@register("mistral3")
class Mistral3(Wrapper):
    """See the module's docstring."""

    about = About(
        checkpoints=("Mistral-Small-4-119B", "Ministral-3"),
        mixer="MLA, yarn, queries scaled by their place; GQA in Ministral 3",
        routing="softmax, groups, shared experts; dense in Ministral 3",
        vision="packed grid, rotary positions alone, a token behind each row",
    )
    texts = ("ministral3", "mistral4")
    tower = PIXTRAL_TOWER
    older: ClassVar = shared.LANGUAGE_MODEL
    head_by_checkpoint = True
    own_names: ClassVar = {"vision heads": "vision_config.num_attention_heads", "image_token_id": "image_token_index"}

    def translate(self, fields: Fields) -> ModelConfig:
        text, decoder = self.decoder(fields)
        return ModelConfig(
            model_type="mistral3",
            decoder=decoder,
            vision=pixtral_tower(fields.sub("vision_config"), fields, decoder.hidden, decoder.epsilon),
            image_token_id=fields.aliased("image_token_index", "image_token_id", 10),
            eos_token_ids=shared.eos_ids(fields, text, self.text.eos),
            mark_texts={"row_break": "[IMG_BREAK]", "end": "[IMG_END]"},
        )
