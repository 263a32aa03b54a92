"""config.json with a memory: what was read is supported, and what is left over must be known to be harmless."""

from collections.abc import Mapping, Sequence
from typing import Any

from moevlm.export.families.harmless import is_harmless
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError, quoted, shown

_REQUIRED = object()

# The most that a count may be: far above any model, and low enough that every product of sizes fits 62 bits and
# the work before the tensors are compared is small.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "depth", "n_shared_experts"), 1024),
    "linear_conv_kernel_dim": 64,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 1 << 12),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"), 1 << 14),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 1 << 12),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "image_size"), 1 << 14),
    **dict.fromkeys(("patch_size", "temporal_patch_size", "in_channels", "num_channels"), 1 << 10),
    **dict.fromkeys(("spatial_merge_size", "pooling_kernel_size"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok"), 1 << 16),
    **dict.fromkeys(
        (
            "vocab_size",
            "image_token_id",
            "image_token_index",
            "media_placeholder_token_id",
            "video_token_id",
            "eos_token_id",
        ),
        1 << 24,
    ),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), (1 << 31) - 1),
}
_MOST_OF_OTHERS = 1 << 20
_MOST_ITEMS, _LARGEST_ITEM = 1 << 12, (1 << 31) - 1  # of a list
_SMALLEST, _LARGEST = 1e-30, 1e30  # of numbers that are no counts; float32 holds them


class Fields:
    """A view of one JSON object of config.json. `path` is its name in error messages.

    ignored: dotted names of fields that a user wants to be left unread, see `families.base.Family.config`.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "", ignored: Sequence[str] = ()) -> None:
        self._values, self._path, self._ignored = values, path, ignored
        self._used: dict[str, Any] = {}
        self._children: list[Fields] = []

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value, or the default if the key is absent or null. Raises CheckpointError for a required key."""
        if self._name(key) in self._ignored:
            raise UnsupportedModelError(f"cannot ignore {self._name(key)} of config.json: it is supported and used")
        value = self._values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"config.json lacks {self._name(key)}")
            value = default
        self._used[key] = value
        return value

    def __getitem__(self, key: str) -> Any:
        return self.get(key)

    def positive(self, key: str, default: Any = _REQUIRED, null: int | None = None) -> int:
        """An integer from 1 to the most that this field may be. null: what null means, where it is not refused."""
        return self._whole(key, default, 1, null)

    def aliased(self, key: str, alias: str, default: Any = _REQUIRED) -> int:
        """A positive integer under either name, or under both with one value."""
        value = self.positive(key if key in self or alias not in self else alias, default)
        if alias in self and self[alias] != value:
            raise self.invalid(alias, self[alias], f"{self._name(key)} = {value}")
        return value

    def repeated(self, key: str, value: int) -> None:
        """Allow a field that transformers does not read, where it repeats the value of another one."""
        if self._values.get(key) == value:
            self._used[key] = value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """An integer from 0 to the most that this field may be."""
        return self._whole(key, default, 0)

    def _whole(self, key: str, default: Any, least: int, null: int | None = None) -> int:
        value, most = self._not_absent(key, default, null), _MOST.get(key, _MOST_OF_OTHERS)
        if not _is_count(value) or not least <= value <= most:
            raise self.invalid(key, value, f"an integer from {least} to {most}")
        return int(value)

    def counts(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of integers, 0 or more each."""
        value = self.get(key, default)
        fits = isinstance(value, list | tuple) and len(value) <= _MOST_ITEMS and all(map(_is_count, value))
        if not fits or max(value, default=0) > _LARGEST_ITEM:
            raise self.invalid(key, value, f"a list of integers from 0 to {_LARGEST_ITEM}, at most {_MOST_ITEMS}")
        return tuple(value)

    def ids(self, key: str, default: tuple[int, ...], null: tuple[int, ...] = ()) -> tuple[int, ...]:
        """One token id, a list of them, or null."""
        if self.is_null(key):
            return null
        value = self.get(key, default)
        return self.counts(key, default) if isinstance(value, list | tuple) else (self._whole(key, default, 0),)

    def _not_absent(self, key: str, default: Any, null: Any) -> Any:
        """The value, where null is something else than an absent field: transformers has defaults for absent ones."""
        value = self.get(key, default)
        return null if self.is_null(key) else value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number that float32 holds."""
        value = self._not_absent(key, default, None)
        if not _is_number(value):
            raise self.invalid(key, value, f"a number from {_SMALLEST} to {_LARGEST}")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` positive numbers that float32 holds."""
        value = self.get(key)
        if not isinstance(value, list | tuple) or len(value) != length or not all(map(_is_number, value)):
            raise self.invalid(key, value, f"{length} numbers from {_SMALLEST} to {_LARGEST}")
        return tuple(map(float, value))

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null is false."""
        value = self._not_absent(key, default, False)
        if not isinstance(value, bool):
            raise self.invalid(key, value, "true or false")
        return value

    def invalid(self, key: str, value: Any, allowed: str) -> CheckpointError:
        """The error for the value of `key`, which may be its default."""
        return CheckpointError(f"invalid value in config.json: {self._name(key)} = {shown(value)} (allowed: {allowed})")

    def choice(self, key: str, allowed: Mapping[Any, Any] | Sequence[Any], default: Any = _REQUIRED) -> Any:
        """One of `allowed`; with a mapping, what the value maps to. Raises UnsupportedModelError for any other."""
        value = self.get(key, default)
        if isinstance(value, dict | list) or value not in allowed:
            names = ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in allowed)
            raise UnsupportedModelError(
                f"unsupported value in config.json: {self._name(key)} = {quoted(value)} (supported: {names})"
            )
        return allowed[value] if isinstance(allowed, Mapping) else value

    def each(self, key: str, allowed: Sequence[str], default: tuple[str, ...]) -> tuple[str, ...]:
        """A list as long as `default`, each entry one of `allowed`. Raises UnsupportedModelError for any other."""
        value = self.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != len(default) or any(v not in allowed for v in value):
            names = f"{len(default)} times {' or '.join(allowed)}"
            raise UnsupportedModelError(
                f"unsupported value in config.json: {self._name(key)} = {shown(value)} (supported: {names})"
            )
        return tuple(value)

    def sub(self, key: str, default: Mapping[str, Any] | None = None, *, nulls: bool = True) -> "Fields":
        """A nested object. nulls: in it, null is something else than an absent field."""
        value = self.get(key) if default is None else self.get(key, default)
        if not isinstance(value, Mapping):
            raise self.invalid(key, value, "an object")
        if not nulls:
            value = {name: entry for name, entry in value.items() if entry is not None}
        child = Fields(value, self._name(key), self._ignored)
        self._children.append(child)
        return child

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the field is there, and null, where that is not the same as its absence."""
        return key in self._values and self._values[key] is None

    def refuse_unread(self) -> None:
        """Raise UnsupportedModelError for the first field that was not read and could change the maths.

        A field that is off, harmless or to be ignored is none. Nor is the copy of a nested object's field that says
        the same: older releases wrote text_config's fields a second time at the top, where nobody reads them.
        """
        for key in sorted(set(self._values) - set(self._used)):
            value = self._values[key]
            if value in (None, False, [], {}) or is_harmless(key) or self._name(key) in self._ignored:
                continue
            original = next((child for child in self._children if key in child._used), None)
            found = f"unsupported field in config.json: {self._name(key)} = {shown(value)}"
            if original is None:
                remedy = f" (if it leaves the arithmetic as it is: --ignore-config {self._name(key)})"
                raise UnsupportedModelError(found + remedy)
            if original._used[key] != value:
                raise UnsupportedModelError(f"{found} (allowed: {original._name(key)} = {shown(original._used[key])})")
        for child in self._children:
            child.refuse_unread()

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _SMALLEST <= value <= _LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
