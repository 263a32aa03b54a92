"""What a family is: a config translation and a table of weight names. One file and one registry entry each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moevlm.export.config import ModelConfig
from moevlm.export.families.about import About
from moevlm.export.families.fields import Fields
from moevlm.export.families.sources import Source
from moevlm.runtime.core.errors import FieldError, UnsupportedModelError, one_line, quoted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# What the canonical config calls a field -> its name in config.json in most families.
_CONFIG_NAMES = {
    "deepstack layers": "vision_config.deepstack_visual_indexes",
    "delta key_dim": "text_config.linear_key_head_dim",
    "delta value_dim": "text_config.linear_value_head_dim",
    "experts": "text_config.num_experts",
    "head_dim": "text_config.head_dim",
    "head_dim without a window": "text_config.head_dim",
    "heads": "text_config.num_attention_heads",
    "hidden": "text_config.hidden_size",
    "key_heads": "text_config.linear_num_key_heads",
    "kernel": "text_config.linear_conv_kernel_dim",
    "kv_heads": "text_config.num_key_value_heads",
    "top_k": "text_config.num_experts_per_tok",
    "topk_group": "text_config.topk_group",
    "value_heads": "text_config.linear_num_value_heads",
    "video_begin": "vision_start_token_id",
    "video_end": "vision_end_token_id",
    "vision head_dim": "vision_config.head_dim",
    "vision heads": "vision_config.num_heads",
    "width of experts": "text_config.moe_intermediate_size",
    "width of visual tokens": "vision_config.out_hidden_size",
}

# Of every family.
LEFT_OUT = {r"rotary_emb\.inv_freq": "they follow from config.json"}

_REGISTRY: dict[str, type["Family"]] = {}


def register(model_type: str) -> Callable[[type["Family"]], type["Family"]]:
    """Class decorator: the family that serves this `model_type`."""

    def add(family: type["Family"]) -> type["Family"]:
        _REGISTRY[model_type] = family
        return family

    return add


def families() -> dict[str, type["Family"]]:
    """All families, by model_type."""
    return dict(sorted(_REGISTRY.items()))


def family_for(config: Mapping[str, Any]) -> "Family":
    """The family of a parsed config.json. Raises UnsupportedModelError, naming what is supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise UnsupportedModelError(
            f"unsupported value in config.json: model_type = {quoted(model_type)} (supported: {known})"
        )
    return _REGISTRY[model_type].of(config)


class Family(ABC):
    """weights: canonical parameter name, with {i} for a number, to where it lies in the checkpoint.

    about: what people are told.
    router_suffix: how the names of transformers' router modules end.
    config_names: what the canonical config calls a field -> its name in this family's config.json, where that is not
    the usual one.
    older: prefixes of tensors in older checkpoints, which transformers reads, by its own.
    left_out: patterns of tensors that have no part in text and images, or that transformers does not load, and why.
    part: the object of config.json that describes the model of text and images; empty for config.json itself.
    splitting: how a text is split where a checkpoint's tokenizer does not say it, as a regular expression; empty where
    that is not known.
    """

    about: ClassVar[About]
    part: ClassVar[str] = ""
    older: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The family of a parsed config.json, which may say more of it than its name."""
        del values
        return cls()

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, str | Source]:
        """See above."""

    @property
    @abstractmethod
    def router_suffix(self) -> str:
        """See above."""

    @property
    def config_names(self) -> Mapping[str, str]:
        """See above."""
        return {}

    @property
    def left_out(self) -> Mapping[str, str]:
        """See above."""
        return LEFT_OUT

    @property
    def splitting(self) -> str:
        """See above."""
        return ""

    def routed(self, returned: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
        """Logits [T, E] and chosen experts [T, k], in any order, of what a router module of transformers returns."""
        scores, _, index = returned
        return scores, index

    def mend(self, model: "PreTrainedModel") -> None:  # noqa: B027 - most need nothing
        """Let transformers' model of this family run, for parity, where it cannot as it is."""

    @abstractmethod
    def translate(self, fields: Fields) -> ModelConfig:
        """config.json to the canonical config; reads every field that changes the maths."""

    def config(self, values: Mapping[str, Any], ignored: Sequence[str] = ()) -> ModelConfig:
        """The canonical config; refuses fields that were not understood and sizes that do not fit together.

        ignored: dotted names of fields that would be refused, to be left out of account. Raises UnsupportedModelError
        for one that is not there or that is read.
        """
        for name in ignored:
            _require_field(values, name)
        fields = Fields(values, ignored=ignored)
        try:
            config = self.translate(fields)
        except FieldError as error:  # from the canonical config or a spec
            told = error.named(self.field_name(error.field))
            raise UnsupportedModelError(f"unsupported value in config.json: {told}") from error
        fields.refuse_unread()
        return config

    def field_name(self, field: str) -> str:
        """The dotted name in config.json of what the canonical config calls `field`."""
        name = {**_CONFIG_NAMES, **self.config_names}.get(field, field)
        return f"{self.part}.{name}" if self.part else name


def _require_field(values: Mapping[str, Any], name: str) -> None:
    place: Any = values
    for key in name.split("."):
        if not isinstance(place, Mapping) or key not in place:
            raise UnsupportedModelError(f"cannot ignore {one_line(name, 80)}: config.json has no such field")
        place = place[key]
