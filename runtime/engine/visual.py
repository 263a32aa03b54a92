"""Visual features of images: handles to where an engine keeps them, and which of their rows a step reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class VisualFeatures(Protocol):
    """Features of one or more images, in the memory of the engine that made them until the last reference goes.

    rows: V, one for each visual token. nbytes: of that memory.
    """

    @property
    def rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

    def split(self, rows: Sequence[int]) -> list[VisualFeatures]:
        """One handle for each image, whose memory is its own. rows: of each image, V together."""
        ...

    def to_host(self) -> HostFeatures:
        """The values."""
        ...


@dataclass(frozen=True)
class HostFeatures:
    """embeds: [V, H] float32, V = P / merge**2; deepstack: [L, V, H] float32, L may be 0."""

    embeds: np.ndarray
    deepstack: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.embeds)

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + self.deepstack.nbytes

    def split(self, rows: Sequence[int]) -> list[VisualFeatures]:
        if len(rows) == 1:
            return [self]
        ends = np.cumsum(rows)[:-1]
        embeds, deepstack = np.split(self.embeds, ends), np.split(self.deepstack, ends, axis=1)
        return [HostFeatures(one.copy(), levels.copy()) for one, levels in zip(embeds, deepstack, strict=True)]

    def to_host(self) -> HostFeatures:
        return self


@dataclass(frozen=True)
class FeatureRows:
    """Rows start to stop of features."""

    features: VisualFeatures
    start: int
    stop: int

    @classmethod
    def all_of(cls, features: VisualFeatures) -> FeatureRows:
        """Every row."""
        return cls(features, 0, features.rows)

    @property
    def rows(self) -> int:
        return self.stop - self.start


def rows_between(features: Iterable[VisualFeatures], begin: int, end: int) -> list[FeatureRows]:
    """Rows begin to end of features that follow each other."""
    found, first = [], 0
    for one in features:
        start, stop = max(begin - first, 0), min(end - first, one.rows)
        if start < stop:
            found.append(FeatureRows(one, start, stop))
        first += one.rows
    return found


def step_features(
    parts: Iterable[tuple[np.ndarray, Callable[[int, int], Iterable[FeatureRows]]]],
) -> tuple[np.ndarray, tuple[FeatureRows, ...]]:
    """What the tokens of a step see of images.

    parts: for each sequence the rows of its own features that its tokens stand for, rising, -1 for text, [t] int64;
    and what finds these rows. Returns (visual_index [T] int64, the slices that it counts through).
    """
    index: list[np.ndarray] = []
    found: list[FeatureRows] = []
    rows = 0
    for own, between in parts:
        if (wanted := own[own >= 0]).size:
            begin, end = int(wanted[0]), int(wanted[-1]) + 1
            found.extend(between(begin, end))
            own = np.where(own >= 0, own - begin + rows, -1)
            rows += end - begin
        index.append(own)
    return np.concatenate(index), tuple(found)


def joined(visual: Sequence[FeatureRows]) -> HostFeatures:
    """The values of one slice or more, one after the other."""
    hosts = [one.features.to_host() for one in visual]
    parts = [slice(one.start, one.stop) for one in visual]
    embeds = [host.embeds[part] for host, part in zip(hosts, parts, strict=True)]
    deepstack = [host.deepstack[:, part] for host, part in zip(hosts, parts, strict=True)]
    if len(visual) == 1:
        return HostFeatures(embeds[0], deepstack[0])
    return HostFeatures(np.concatenate(embeds), np.concatenate(deepstack, axis=1))
