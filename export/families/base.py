"""What a family is: a config translation and a table of weight names. One file and one registry entry each."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from moevlm.export.checkpoint.lora.adapter import Update
from moevlm.export.config import ModelConfig
from moevlm.export.families.about import About
from moevlm.export.families.experts import LAYOUTS, ExpertsPart
from moevlm.export.families.fields import Fields
from moevlm.export.families.names import MissingTensorError, Tensors, missing_error
from moevlm.export.families.sources import Source, first_name, named
from moevlm.export.graph.weights import Weight, cast, slices
from moevlm.runtime.core.errors import CheckpointError, FieldError, UnsupportedModelError, one_line, quoted
from moevlm.runtime.core.printable import counted

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


@dataclass(frozen=True)
class Binding:
    """weights: a recipe by canonical parameter name. used: names of the checkpoint's tensors that they are made of.

    left_out: how many tensors nothing needs, by a part of their names. why: the reason for that, by the same part.
    """

    weights: Mapping[str, Weight]
    left_out: Mapping[str, int]
    why: Mapping[str, str]
    used: Collection[str]


class Family(ABC):
    """weights: canonical parameter name, with {i} for a number, to where it lies in the checkpoint.

    about: what people are told.
    router_suffix: how the names of transformers' router modules end.
    config_names: what the canonical config calls a field -> its name in this family's config.json, where that is not
    the usual one.
    older: prefixes of tensors in older checkpoints, which transformers reads, by its own.
    left_out: patterns of tensors that have no part in text and images, or that transformers does not load, and why.
    part: the object of config.json that describes the model of text and images; empty for config.json itself.
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

    def bind(
        self,
        parameters: Mapping[str, tuple[int, ...]],
        on_disk: Mapping[str, Weight],
        expert_layout: str = "auto",
        ignorable: Mapping[str, str] | None = None,
        updates: Mapping[str, Sequence[Update]] | None = None,
    ) -> Binding:
        """A float32 recipe for every canonical parameter (name -> shape).

        ignorable: patterns of tensors that may be left out, and why, beside the family's own. updates: of an adapter,
        by the module's name in transformers. Raises CheckpointError for a tensor that is absent, has another shape or
        no float dtype, or is left over, and for an update with no place in the model.
        """
        if expert_layout not in LAYOUTS:
            raise CheckpointError(f'expert_layout = "{expert_layout}" (allowed: {", ".join(LAYOUTS)})')
        tensors = Tensors(on_disk, updates, self.older)
        bound, missing = {}, []
        for name, shape in parameters.items():
            source, indices = self._source(name)
            try:
                found = source(tensors, indices, shape, expert_layout)
                if isinstance(source, ExpertsPart):
                    found = source.arranged(tensors.merged_experts(source.base.format(**indices), found))
                bound[name] = cast(found, np.dtype(np.float32))
            except MissingTensorError as error:
                missing.append(error.name)
        if missing:
            raise missing_error(list(dict.fromkeys(missing)), on_disk.keys())
        if "decoder.head" not in parameters:
            self._check_tied_head(tensors, bound["decoder.embedding"])
        _require_merged(updates or {}, tensors.merged)
        unused = on_disk.keys() - tensors.used
        patterns = {**self.left_out, **(ignorable or {})}
        why = {_told(pattern): reason for pattern, reason in patterns.items()}
        return Binding(bound, _counted(unused, patterns), why, tensors.used)

    def _check_tied_head(self, tensors: Mapping[str, Weight], embedding: Weight) -> None:
        """A tied checkpoint may still carry its head, but transformers ties only a head that equals the embedding."""
        source, indices = self._source("decoder.head")
        name = first_name(self.weights["decoder.head"])
        if name not in tensors:
            return
        head = cast(source(tensors, indices, embedding.shape, "auto"), embedding.dtype)
        if not all(map(np.array_equal, slices(head), slices(embedding))):
            raise CheckpointError(
                f"tensor {name} differs from the embedding, though config.json says tie_word_embeddings = true"
            )

    def _source(self, name: str) -> tuple[Source, dict[str, str]]:
        for pattern, source in self.weights.items():
            match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)"), name)
            if match:
                return (named(source) if isinstance(source, str) else source), match.groupdict()
        raise KeyError(f"{type(self).__name__} has no source for {name}")


def _require_field(values: Mapping[str, Any], name: str) -> None:
    place: Any = values
    for key in name.split("."):
        if not isinstance(place, Mapping) or key not in place:
            raise UnsupportedModelError(f"cannot ignore {one_line(name, 80)}: config.json has no such field")
        place = place[key]


def _counted(unused: Collection[str], patterns: Collection[str]) -> dict[str, int]:
    """Count the tensors that fit each pattern. Raises CheckpointError for one that fits none."""
    found = {name: next((p for p in patterns if re.search(p, name)), None) for name in sorted(unused)}
    strangers = [name for name, pattern in found.items() if pattern is None]
    if strangers:
        first = one_line(strangers[0], 80)
        raise CheckpointError(
            f"without a place in the model: {counted(len(strangers), 'tensor')} of the checkpoint, first {first}"
        )
    return dict(Counter(_told(str(pattern)) for pattern in found.values()))


def _told(pattern: str) -> str:
    """The part of names that a pattern asks for: audio_tower for ^audio_tower\\..*"""
    return pattern.replace("\\", "").removeprefix("^").rstrip("$.*")


def _require_merged(updates: Mapping[str, Sequence[Update]], merged: Collection[Update]) -> None:
    left = [update for each in updates.values() for update in each if update not in merged]
    if left:
        first = f"{one_line(left[0].module, 80)}, {list(left[0].shape)}"
        raise CheckpointError(f"the adapter has updates without a place in the model: {len(left)}, first {first}")
