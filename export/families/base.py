"""What a family is: a config translation and a table of weight names. One file and one registry entry each."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from moevlm.export.config import ModelConfig
from moevlm.export.families.fields import HARMLESS, Fields
from moevlm.export.families.sources import LAYOUTS, Source, named
from moevlm.export.weights import Weight, cast, slices
from moevlm.runtime.errors import CheckpointError, UnsupportedModelError

# How the canonical config's own checks call a field -> its name in config.json, which is the same in every family.
_CONFIG_NAMES = {
    "deepstack layers": "vision_config.deepstack_visual_indexes",
    "kv_heads": "text_config.num_key_value_heads",
    "top_k": "text_config.num_experts_per_tok",
    "topk_group": "text_config.topk_group",
    "vision heads": "vision_config.num_heads",
    "width of visual tokens": "vision_config.out_hidden_size",
}

_REGISTRY: dict[str, type["Family"]] = {}


def register(model_type: str) -> Callable[[type["Family"]], type["Family"]]:
    """Class decorator: the family that serves this `model_type`."""

    def add(family: type["Family"]) -> type["Family"]:
        _REGISTRY[model_type] = family
        return family

    return add


def family_for(config: Mapping[str, Any]) -> "Family":
    """The family of a parsed config.json. Raises UnsupportedModelError, naming what is supported."""
    model_type = config.get("model_type")
    if model_type not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise UnsupportedModelError(
            f'unsupported value in config.json: model_type = "{model_type}" (supported: {known})'
        )
    return _REGISTRY[model_type]()


class Family(ABC):
    """weights: canonical parameter name, with {i} for a number, to where it lies in the checkpoint.

    router_suffix: how the names of transformers' router modules end; they return (logits, weights, indices).
    """

    weights: ClassVar[Mapping[str, str | Source]]
    router_suffix: ClassVar[str]

    @abstractmethod
    def translate(self, fields: Fields) -> ModelConfig:
        """config.json to the canonical config; reads every field that changes the maths."""

    def config(self, values: Mapping[str, Any]) -> ModelConfig:
        """The canonical config; refuses fields that were not understood and sizes that do not fit together."""
        fields = Fields(values)
        try:
            config = self.translate(fields)
        except ValueError as error:  # "name = value (allowed: ...)", from the canonical config or a spec
            name, *rest = str(error).partition(" = ")
            field = _CONFIG_NAMES.get(name, name) + "".join(rest)
            raise UnsupportedModelError(f"unsupported value in config.json: {field}") from error
        fields.refuse_unread(HARMLESS)
        return config

    def bind(
        self, parameters: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Weight], expert_layout: str = "auto"
    ) -> dict[str, Weight]:
        """A float32 recipe for every canonical parameter (name -> shape).

        Raises CheckpointError for a tensor that is absent, has another shape or no float dtype, or is left over.
        """
        if expert_layout not in LAYOUTS:
            raise CheckpointError(f'expert_layout = "{expert_layout}" (allowed: {", ".join(LAYOUTS)})')
        used = _Recorder(tensors)
        bound = {}
        for name, shape in parameters.items():
            source, indices = self._source(name)
            bound[name] = cast(source(used, indices, shape, expert_layout), np.dtype(np.float32))
        if "decoder.head" not in parameters:
            self._check_tied_head(used, bound["decoder.embedding"])
        left = [name for name in tensors if name not in used.names]
        if left:
            raise CheckpointError(f"{len(left)} tensors of the checkpoint have no place in the model, first: {left[0]}")
        return bound

    def _check_tied_head(self, tensors: Mapping[str, Weight], embedding: Weight) -> None:
        """A tied checkpoint may still carry its head, but transformers ties only a head that equals the embedding."""
        name = str(self.weights["decoder.head"])
        if name not in tensors:
            return
        source, indices = self._source("decoder.head")
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


class _Recorder(Mapping[str, Weight]):
    """The checkpoint's tensors, remembering which were asked for."""

    def __init__(self, tensors: Mapping[str, Weight]) -> None:
        self._tensors, self.names = tensors, set[str]()

    def __getitem__(self, name: str) -> Weight:
        self.names.add(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
