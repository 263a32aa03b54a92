"""Llama 4: tiles with an overview, and the decoder of `text.llama4_text`.

Source: transformers 5.24 `models/llama4`. Checkpoints: meta-llama/Llama-4-Scout-17B-16E-Instruct,
...-Maverick-17B-128E-Instruct.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moevlm.export.config import ModelConfig
from moevlm.export.families import shared
from moevlm.export.families.about import About
from moevlm.export.families.base import register
from moevlm.export.families.fields import Fields
from moevlm.export.families.llama4_vision import llama4_tower, llama4_tower_weights
from moevlm.export.families.text.base import TextModel, text_model
from moevlm.export.families.text.llama4_text import Llama4Text
from moevlm.export.families.text.wrapper import Wrapper
from moevlm.runtime.core.manifest import ImageMarks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("llama4")
class Llama4(Wrapper):
    """See the module's docstring."""

    about = About(
        checkpoints=("Llama-4-Scout-17B-16E", "Llama-4-Maverick-17B-128E"),
        mixer=Llama4Text.mixer,
        routing=Llama4Text.routing,
        vision="tiles of one size and an overview, pixel shuffle",
    )
    texts = ("llama4_text",)
    tower: ClassVar = {}  # where it lies depends on the size of its heads
    model = "language_model.model."
    head = "language_model.lm_head.weight"
    own_names: ClassVar = {
        "image_token_id": "image_token_index",
        "image_begin": "boi_token_index",
        "image_end": "eoi_token_index",
        "vision heads": "vision_config.num_attention_heads",
    }

    def __init__(self, text: TextModel, head_dim: int) -> None:
        """head_dim: of the tower's heads."""
        super().__init__(text)
        self._head_dim = head_dim

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        fields = Fields(values)
        tower = llama4_tower(fields.sub("vision_config"), fields.sub("text_config").positive("hidden_size"))
        return cls(text_model(fields.sub("text_config"), cls.texts), tower.head_dim)

    @property
    def weights(self) -> shared.Weights:
        return {**super().weights, **llama4_tower_weights(self._head_dim)}

    def mend(self, model: "PreTrainedModel") -> None:
        def add_field(_module: object, _inputs: object, output: Any) -> None:
            output.image_outputs = None  # in 5.24 the whole model asks its language model's output for it, in vain

        model.get_submodule("language_model").register_forward_hook(add_field)

    def translate(self, fields: Fields) -> ModelConfig:
        text, vision = fields.sub("text_config"), fields.sub("vision_config")
        fields.get("tie_word_embeddings", None)  # the inner field decides
        decoder = self.text.decoder(text, text.flag("tie_word_embeddings", False))
        return ModelConfig(
            model_type="llama4",
            decoder=decoder,
            vision=llama4_tower(vision, decoder.hidden),
            image_token_id=fields.aliased("image_token_index", "image_token_id", 200092),
            eos_token_ids=shared.eos_ids(fields, text, self.text.eos),
            image_marks=ImageMarks(
                begin=(fields.aliased("boi_token_index", "boi_token_id", 200080),),
                end=(fields.aliased("eoi_token_index", "eoi_token_id", 200081),),
            ),
            mark_texts={
                **dict.fromkeys(("placeholder", "overview"), "<|image|>"),
                "tile_break": "<|tile_x_separator|>",
                "tile_row_end": "<|tile_y_separator|>",
            },
        )
