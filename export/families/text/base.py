"""What a text model is: a decoder by its own model_type, for families that take one of several before their tower."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from moevlm.export.config import DecoderConfig
from moevlm.export.families.fields import Fields
from moevlm.export.families.shared import Weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_REGISTRY: dict[str, type["TextModel"]] = {}


class TextModel(ABC):
    """mixer, routing: what people are told, see `about.About`.

    eos, tied: eos_token_id and tie_word_embeddings where config.json has none. router_suffix, left_out, splitting: as
    in `base.Family`. config_names: too, by the fields' names inside of the text's object.
    """

    mixer: ClassVar[str]
    routing: ClassVar[str]
    router_suffix: ClassVar[str]
    eos: ClassVar[tuple[int, ...]] = ()
    tied: ClassVar[bool] = False
    config_names: ClassVar[Mapping[str, str]] = {}
    left_out: ClassVar[Mapping[str, str]] = {}
    splitting: ClassVar[str] = ""

    @classmethod
    def of(cls, text: Fields) -> Self:
        """The model of a text's fields, which may say how its weights lie."""
        del text
        return cls()

    @abstractmethod
    def decoder(self, text: Fields, tied: bool) -> DecoderConfig:
        """The canonical config of the text's fields. tied: the head is the embedding."""

    @abstractmethod
    def weights(self, model: str, head: str) -> Weights:
        """Where the decoder's weights lie. model: the prefix of all, such as "model.". head: the name of the head's."""

    def routed(self, returned: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
        """As in `base.Family`."""
        scores, _, index = returned
        return scores, index

    def mend(self, model: "PreTrainedModel") -> None:  # noqa: B027 - most need nothing
        """As in `base.Family`, for transformers' model of the text alone."""


def register_text(model_type: str) -> Callable[[type[TextModel]], type[TextModel]]:
    """Class decorator: the text model of this `model_type`."""

    def add(text: type[TextModel]) -> type[TextModel]:
        _REGISTRY[model_type] = text
        return text

    return add


def text_models() -> dict[str, type[TextModel]]:
    """All text models, by model_type."""
    return dict(sorted(_REGISTRY.items()))


def text_model(text: Fields, allowed: Collection[str]) -> TextModel:
    """The text model that an object of config.json names. Raises UnsupportedModelError for one that is not allowed."""
    model_type: str = text.choice("model_type", sorted(allowed))
    return _REGISTRY[model_type].of(text)
