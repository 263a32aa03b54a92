"""Aria: a SigLIP tower whose patches are asked by queries, before a text model with two shared experts.

Source: transformers 5.24 `models/aria`. Checkpoints: rhymes-ai/Aria.
"""

from typing import ClassVar

from moevlm.export.config import ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.aria_vision import ARIA_LEFT_OUT, ARIA_TOWER, aria_tower
from moevlm.export.families.base import register
from moevlm.export.families.fields import Fields
from moevlm.export.families.text.wrapper import Wrapper


@register("aria")
class Aria(Wrapper):
    """See the module's docstring."""

    about = About(
        checkpoints=("Aria",),
        mixer="GQA",
        routing="softmax, renormalised; shared experts",
        vision="packed grid, as many visual tokens for every image, by cross-attention",
    )
    texts = ("aria_text",)
    tower = ARIA_TOWER
    older: ClassVar = shared.LANGUAGE_MODEL
    head_by_checkpoint = True
    own_left_out: ClassVar = ARIA_LEFT_OUT
    own_names: ClassVar = {"vision heads": "vision_config.num_attention_heads", "image_token_id": "image_token_index"}

    def translate(self, fields: Fields) -> ModelConfig:
        text, decoder = self.decoder(fields)
        for part, key in ((fields, "ignore_index"), (text, "moe_z_loss_coeff"), (text, "moe_aux_loss_coeff")):
            part.get(key, None)  # of training, as its first releases wrote them
        return ModelConfig(
            model_type="aria",
            decoder=decoder,
            vision=aria_tower(fields.sub("vision_config"), fields, decoder.hidden),
            image_token_id=fields.aliased("image_token_index", "image_token_id", 9),
            eos_token_ids=shared.eos_ids(fields, text, self.text.eos),
        )
