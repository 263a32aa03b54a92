"""config.json with a memory: what was read is supported, and what is left over must be known to be harmless."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moevlm.runtime.errors import CheckpointError, UnsupportedModelError

_REQUIRED = object()

# Training, bookkeeping, and defaults of Hugging Face's base class: none of these changes a forward pass.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "base_model_ep_plan",
        "base_model_tp_plan",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "video_start_token_id",
        "video_end_token_id",
        "image_start_token_id",
        "image_token_id",
        "image_end_token_id",
    ]
)


class Fields:
    """A view of one JSON object of config.json. `path` is its name in error messages."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values, self._path = values, path
        self._read: set[str] = set()
        self._children: list[Fields] = []

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value, or the default if the key is absent or null. Raises CheckpointError for a required key."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"config.json lacks {self._name(key)}")
            return default
        return value

    def __getitem__(self, key: str) -> Any:
        return self.get(key)

    def positive(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if not _is_count(value) or value < 1:
            raise self.invalid(key, value, "a positive integer")
        return int(value)

    def aliased(self, key: str, alias: str) -> int:
        """A positive integer under either name, or under both with one value."""
        value = self.positive(key if key in self or alias not in self else alias)
        if alias in self and self[alias] != value:
            raise self.invalid(alias, self[alias], f"{self._name(key)} = {value}")
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """An integer, 0 or more."""
        value = self.get(key, default)
        if not _is_count(value):
            raise self.invalid(key, value, "an integer, 0 or more")
        return int(value)

    def counts(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of integers, 0 or more each."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple) or not all(map(_is_count, value)):
            raise self.invalid(key, value, "a list of integers")
        return tuple(value)

    def ids(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """One token id, a list of them, or nothing."""
        value = self.get(key, default)
        return (value,) if _is_count(value) else self.counts(key, default)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.invalid(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.invalid(key, value, "true or false")
        return value

    def invalid(self, key: str, value: Any, allowed: str) -> CheckpointError:
        """The error for the value of `key`, which may be its default."""
        return CheckpointError(f"invalid value in config.json: {self._name(key)} = {value!r} ({allowed})")

    def choice(self, key: str, allowed: Mapping[Any, Any] | Sequence[Any], default: Any = _REQUIRED) -> Any:
        """One of `allowed`; with a mapping, what the value maps to. Raises UnsupportedModelError for any other."""
        value = self.get(key, default)
        if isinstance(value, dict | list) or value not in allowed:
            shown = f'"{value}"' if isinstance(value, str) else value
            names = ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in allowed)
            raise UnsupportedModelError(
                f"unsupported value in config.json: {self._name(key)} = {shown} (supported: {names})"
            )
        return allowed[value] if isinstance(allowed, Mapping) else value

    def every(self, key: str, allowed: str, length: int) -> None:
        """A list of `length` times `allowed`, or nothing. Raises UnsupportedModelError for any other."""
        value = self.get(key, None)
        if value is not None and value != [allowed] * length:
            raise UnsupportedModelError(
                f"unsupported value in config.json: {self._name(key)} = {value!r} (supported: {length} times {allowed})"
            )

    def sub(self, key: str, default: Mapping[str, Any] | None = None) -> "Fields":
        """A nested object."""
        value = self.get(key) if default is None else self.get(key, default)
        if not isinstance(value, Mapping):
            raise self.invalid(key, value, "an object")
        child = Fields(value, self._name(key))
        self._children.append(child)
        return child

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def refuse_unread(self, harmless: frozenset[str]) -> None:
        """Raise UnsupportedModelError for the first field that nobody read, has a value, and is not harmless."""
        for key in sorted(set(self._values) - self._read - harmless):
            if self._values[key] not in (None, False, [], {}):
                value = self._values[key]
                raise UnsupportedModelError(f"unsupported field in config.json: {self._name(key)} = {value!r}")
        for child in self._children:
            child.refuse_unread(harmless)

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
