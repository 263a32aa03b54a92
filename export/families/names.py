"""Names of tensors on disk: the spellings that transformers reads as one, and what is wrong where none is there.

Source: transformers 5.24 `conversion_mapping.py` (the renamings "legacy") and `core_model_loading.rename_source_key`.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from moevlm.export.checkpoint.lora.adapter import Update
from moevlm.export.families.merging import fits_experts, merge, merge_experts
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.errors import CheckpointError, one_line

_WEIGHT = ".weight"
_BASE, _TEXT = "model.", "model.language_model."
_EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.")  # one expert's part
_MLP, _MIXTRAL = ".mlp.", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_MOST_PREFIXES = 64  # that are tried to explain missing tensors


class MissingTensorError(CheckpointError):
    """A tensor that the model needs is not in the checkpoint. name: as transformers spells it."""

    def __init__(self, name: str, more: str = "") -> None:
        super().__init__(f"the checkpoint lacks tensor {name}{more}")
        self.name = name


class Tensors(Mapping[str, Weight]):
    """A checkpoint's tensors by transformers' names, whichever accepted spelling is on disk, with their updates.

    updates: of an adapter, by module. older: prefixes that the family's checkpoints may have, by transformers' own.
    used: names on disk of tensors that were asked for. merged: updates in them.
    """

    def __init__(
        self,
        on_disk: Mapping[str, Weight],
        updates: Mapping[str, Sequence[Update]] | None = None,
        older: Mapping[str, str] | None = None,
    ) -> None:
        self._on_disk, self._updates, self._older = on_disk, updates or {}, older or {}
        self.used, self.merged = set[str](), set[Update]()

    def __getitem__(self, name: str) -> Weight:
        """Raises MissingTensorError."""
        found = self.spelling(name)
        if found is None:
            raise MissingTensorError(name)
        self.used.add(found)
        own = self.updates_of(name.removesuffix(_WEIGHT)) if name.endswith(_WEIGHT) else ()
        self.merged.update(own)
        return merge(self._on_disk[found], own)

    def updates_of(self, module: str) -> Sequence[Update]:
        """Of the module that transformers calls so."""
        return next((self._updates[spelt] for spelt in self._spellings(module) if spelt in self._updates), ())

    def merged_experts(self, module: str, weight: Weight) -> Weight:
        """One of the tensors of a layer's experts, [E, out, in], with the updates that are for it."""
        own = [update for update in self.updates_of(module) if fits_experts(update, weight)]
        self.merged.update(own)
        return merge_experts(weight, own)

    def __contains__(self, name: Any) -> bool:
        return self.spelling(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._on_disk)

    def __len__(self) -> int:
        return len(self._on_disk)

    def spelling(self, name: str) -> str | None:
        """The name on disk, None if there is none."""
        return next((spelt for spelt in self._spellings(name) if spelt in self._on_disk), None)

    def _spellings(self, name: str) -> Iterator[str]:
        yield from _spellings(name)
        for prefix, older in self._older.items():
            if name.startswith(prefix):
                yield from _spellings(older + name.removeprefix(prefix))


def _spellings(name: str) -> Iterator[str]:
    for spelt in (name, *_of_mixtral(name)):
        yield spelt
        yield _BASE + spelt  # the prefix of the base model once too often
        if spelt.startswith(_BASE):
            yield spelt.removeprefix(_BASE)  # the base model alone was saved
    if ".experts." in name:  # two more that tools that quantize write, the first for Gemma 4
        yield name.replace(".experts.", ".moe.experts.")
        yield _EXPERT.sub(r".experts.\2.\1.", name)
    if name.startswith(_TEXT):
        inner = name.removeprefix(_TEXT)
        yield f"{_TEXT}model.{inner}"
        yield f"language_model.model.model.{inner}"


def _of_mixtral(name: str) -> Iterator[str]:
    """The name of a router or of an expert's part as Mixtral's lie on the hub."""
    if _MLP in name:
        moved = name.replace(_MLP, ".block_sparse_moe.")
        yield _EXPERT.sub(lambda part: f".experts.{part[1]}.{_MIXTRAL.get(part[2], part[2])}.", moved)


def missing_error(missing: Sequence[str], on_disk: Collection[str]) -> MissingTensorError:
    """One line for all tensors that are missing, and the prefix that would explain most of them."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return MissingTensorError(missing[0], more + _prefix_note(missing, on_disk))


def _prefix_note(missing: Sequence[str], on_disk: Collection[str]) -> str:
    for name in dict.fromkeys((missing[0], missing[len(missing) // 2], missing[-1])):
        for wanted, given in islice(_prefixes(name, on_disk), _MOST_PREFIXES):
            explained = sum(n.startswith(wanted) and given + n[len(wanted) :] in on_disk for n in missing)
            if 2 * explained <= len(missing):
                continue
            if not wanted and all(n.startswith(given) for n in on_disk):
                return f": all tensors start with {one_line(given, 80)}, which must be removed"
            if not given:
                return f": {explained} of them are there without the prefix {wanted}"
            instead = f"instead of {wanted}" if wanted else "which must be removed"
            return f": {explained} of them are there under the prefix {one_line(given, 80)} {instead}"
    return ""


def _prefixes(name: str, on_disk: Collection[str]) -> Iterator[tuple[str, str]]:
    """(prefix of `name`, prefix of another name), each pair once, where the rest, two parts or more, is the same.

    The longest rest first. A prefix has no number in it: it stands before all layers.
    """
    parts, seen = name.split("."), set[tuple[str, str]]()
    for i in range(max(1, len(parts) - 1)):
        rest = ".".join(parts[i:])
        wanted = name.removesuffix(rest)
        for other in on_disk:
            pair = wanted, other.removesuffix(rest)
            if not other.endswith(rest) or pair[1] == wanted or pair in seen:
                continue
            seen.add(pair)
            if pair[1][-1:] in ("", ".") and not any(part.isdigit() for part in "".join(pair).split(".")):
                yield pair
