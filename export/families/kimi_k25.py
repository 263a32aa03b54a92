"""Kimi-K2.5: MoonViT before DeepSeek-V3's decoder. Videos are left out.

Source: transformers 5.24 `models/kimi_k25`. Checkpoints: moonshotai/Kimi-K2.5, Kimi-K2.6.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from moevlm.export.config import ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import register
from moevlm.export.families.fields import Fields
from moevlm.export.families.moon import head_dim, moon_tower, moon_weights
from moevlm.export.families.text.base import TextModel, text_model
from moevlm.export.families.text.wrapper import Wrapper


@register("kimi_k25")
class KimiK25(Wrapper):
    """See the module's docstring. head_dim: of the tower's heads."""

    about = About(
        checkpoints=("Kimi-K2.5", "Kimi-K2.6"),
        mixer="MLA, scaled rope",
        routing="sigmoid, correction bias, groups; shared experts",
        vision="packed grid, MoonViT",
    )
    texts = ("deepseek_v3", "kimi_k2")  # the second as published
    older: ClassVar = {
        **shared.LANGUAGE_MODEL,
        # As transformers saves it: what was renamed for its own names is not renamed back alike.
        "model.language_model.layers.": "language_model.model.blocks.",
        "model.vision_tower.patch_embed.": "vision_tower.encoder.patch_embed.",
    }
    head_by_checkpoint = True
    own_names: ClassVar = {"vision heads": "vision_config.num_attention_heads"}

    tower: ClassVar = {}  # where it lies depends on the size of its heads

    def __init__(self, text: TextModel, head_untold: bool, head_dim: int) -> None:
        super().__init__(text, head_untold)
        self._head_dim = head_dim

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        fields = Fields(values)
        text = text_model(fields.sub("text_config"), cls.texts)
        return cls(text, cls._untold(values), head_dim(fields.sub("vision_config")))

    @property
    def weights(self) -> shared.Weights:
        return {**super().weights, **moon_weights(self._head_dim)}

    def translate(self, fields: Fields) -> ModelConfig:
        text, decoder = self.decoder(fields)
        for name in ("ignore_index", "use_unified_vision_chunk", "video_placeholder"):  # of training, and of videos
            fields.get(name, None)
        return ModelConfig(
            model_type="kimi_k25",
            decoder=decoder,
            vision=moon_tower(fields.sub("vision_config"), fields, decoder.hidden),
            image_token_id=fields.aliased("image_token_id", "media_placeholder_token_id", 163605),
            eos_token_ids=shared.eos_ids(fields, text, self.text.eos),
        )
