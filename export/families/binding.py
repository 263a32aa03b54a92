"""Finds a model's weights in a checkpoint, by its family's table of names; every tensor is used or left out by name."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.lora.adapter import Update
from moevlm.export.families.base import Family
from moevlm.export.families.experts import LAYOUTS, ExpertsPart
from moevlm.export.families.names import MissingTensorError, Tensors, missing_error
from moevlm.export.families.shared import Weights
from moevlm.export.families.sources import Source, first_name, named
from moevlm.export.graph.weights import Weight, cast, slices
from moevlm.runtime.core.errors import CheckpointError, one_line
from moevlm.runtime.core.printable import counted


@dataclass(frozen=True)
class Binding:
    """weights: a recipe by canonical parameter name. used: names of the checkpoint's tensors that they are made of.

    left_out: how many tensors nothing needs, by a part of their names. why: the reason for that, by the same part.
    """

    weights: Mapping[str, Weight]
    left_out: Mapping[str, int]
    why: Mapping[str, str]
    used: Collection[str]


def bind(
    family: Family,
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
    sources, tensors = family.weights, Tensors(on_disk, updates, family.older)
    bound, missing = {}, []
    for name, shape in parameters.items():
        source, indices = _source(sources, name)
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
        _check_tied_head(sources, tensors, bound["decoder.embedding"])
    _require_merged(updates or {}, tensors.merged)
    unused = on_disk.keys() - tensors.used
    patterns = {**family.left_out, **(ignorable or {})}
    why = {_told(pattern): reason for pattern, reason in patterns.items()}
    return Binding(bound, _counted(unused, patterns), why, tensors.used)


def _check_tied_head(sources: Weights, tensors: Mapping[str, Weight], embedding: Weight) -> None:
    """A tied checkpoint may still carry its head, but transformers ties only a head that equals the embedding."""
    source, indices = _source(sources, "decoder.head")
    name = first_name(sources["decoder.head"])
    if name not in tensors:
        return
    head = cast(source(tensors, indices, embedding.shape, "auto"), embedding.dtype)
    if not all(map(np.array_equal, slices(head), slices(embedding))):
        raise CheckpointError(
            f"tensor {name} differs from the embedding, though config.json says tie_word_embeddings = true"
        )


def _source(sources: Weights, name: str) -> tuple[Source, dict[str, str]]:
    for pattern, source in sources.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)"), name)
        if match:
            return (named(source) if isinstance(source, str) else source), match.groupdict()
    raise KeyError(f"the family has no source for {name}")


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
