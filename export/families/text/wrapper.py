"""Families that join a tower to a text model that config.json names by its own model_type."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moevlm.export.config import DecoderConfig
from moevlm.export.families.base import LEFT_OUT, Family
from moevlm.export.families.fields import Fields
from moevlm.export.families.shared import Weights
from moevlm.export.families.sources import FirstOf
from moevlm.export.families.text.base import TextModel, text_model

if TYPE_CHECKING:
    from torch import Tensor


TEXT = "text_config."  # before the names of the text's fields


class Wrapper(Family):
    """texts: the model types that text_config may have. tower: where the weights of the vision part lie.

    model, head: the prefix of the text model's tensors, and the name of its head's.
    head_by_checkpoint: a config.json that does not say whether the head is the embedding is of a checkpoint that has a
    head or has not.
    own_left_out, own_names: left_out and config_names of the family, without the text's.
    """

    texts: ClassVar[tuple[str, ...]]
    tower: ClassVar[Weights]
    model: ClassVar[str] = "model.language_model."
    head: ClassVar[str] = "lm_head.weight"
    head_by_checkpoint: ClassVar[bool] = False
    own_left_out: ClassVar[Mapping[str, str]] = {}
    own_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, text: TextModel, head_untold: bool = False) -> None:
        """head_untold: the checkpoint decides whether the head is the embedding."""
        self.text, self._head_untold = text, head_untold

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls(text_model(Fields(values).sub("text_config"), cls.texts), cls._untold(values))

    @classmethod
    def _untold(cls, values: Mapping[str, Any]) -> bool:
        return cls.head_by_checkpoint and values.get("tie_word_embeddings") is None

    def decoder(self, fields: Fields) -> tuple[Fields, DecoderConfig]:
        """The text's fields, and its decoder. The outer object says whether the head is the embedding."""
        text = fields.sub("text_config")
        text.get("tie_word_embeddings", None)
        return text, self.text.decoder(text, fields.flag("tie_word_embeddings", False))

    @property
    def weights(self) -> Weights:
        either = FirstOf((self.head, f"{self.model}embed_tokens.weight"))
        head = {"decoder.head": either} if self._head_untold else {}
        return {**self.text.weights(self.model, self.head), **head, **self.tower}

    @property
    def router_suffix(self) -> str:
        return self.text.router_suffix

    @property
    def config_names(self) -> Mapping[str, str]:
        return {field: f"{TEXT}{name}" for field, name in self.text.config_names.items()} | {**self.own_names}

    @property
    def left_out(self) -> Mapping[str, str]:
        return {**LEFT_OUT, **self.text.left_out, **self.own_left_out}

    @property
    def splitting(self) -> str:
        return self.text.splitting

    def routed(self, returned: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
        return self.text.routed(returned)
