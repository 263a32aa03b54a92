"""Text models as families of their own: a decoder without a tower."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moevlm.export.config import ModelConfig
from moevlm.export.families.about import About
from moevlm.export.families.base import register
from moevlm.export.families.fields import Fields
from moevlm.export.families.text.base import TextModel, text_model
from moevlm.export.families.text.wrapper import TEXT, Wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Alone(Wrapper):
    """A text model's checkpoint, which has the text's fields at the top of config.json."""

    tower: ClassVar = {}
    model: ClassVar = "model."

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls(text_model(Fields(values), cls.texts))

    def field_name(self, field: str) -> str:
        return super().field_name(field).removeprefix(TEXT)

    def mend(self, model: "PreTrainedModel") -> None:
        self.text.mend(model)

    def translate(self, fields: Fields) -> ModelConfig:
        decoder = self.text.decoder(fields, fields.flag("tie_word_embeddings", self.text.tied))
        return ModelConfig(
            model_type=self.texts[0],
            decoder=replace(decoder, visual=False),
            vision=None,
            image_token_id=None,
            eos_token_ids=fields.ids("eos_token_id", self.text.eos),
        )


def register_alone(model_type: str, *published: str) -> Callable[[type[TextModel]], type[TextModel]]:
    """Class decorator: this text model is a family, too. published: its checkpoints."""

    def add(text: type[TextModel]) -> type[TextModel]:
        @register(model_type)
        class Found(Alone):
            texts = (model_type,)
            about = About(checkpoints=published, mixer=text.mixer, routing=text.routing, vision="none")

        del Found  # the registry has it
        return text

    return add
