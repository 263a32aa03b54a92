"""What an engine of the fake TensorRT does when it runs: a graph in ONNX Runtime, on the memory of the fake device.

Of each input exactly that is read which a kernel may read, and it must have been written: of page tables the columns
that a sequence's tokens need, of caches the tokens that it kept, of recurrent states its row. Of caches that alone is
written which the step's tokens own, and of states the rows of its sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime

from moevlm.plugins.ops.candidates import candidates
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS, CANDIDATES
from tests.support.fakes.cuda_driver import Driver

Array = np.ndarray


@functools.cache
def session(graph: str, modified: int) -> onnxruntime.InferenceSession:  # noqa: ARG001 - another file, another session
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # it would say that the fake copies its caches
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class DeviceTensor:
    """Where a tensor of a call lies."""

    driver: Driver
    address: int
    shape: tuple[int, ...]
    dtype: type

    @property
    def _size(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def values(self) -> Array:
        """Its memory, whatever is there."""
        return self.driver.view(self.address, self._size).view(self.dtype).reshape(self.shape)

    @property
    def written(self) -> Array:
        """Whether each value was ever written whole; a copy."""
        flags = self.driver.space.written(self.address, self._size)
        return flags.reshape(*self.shape, -1).all(axis=-1)

    def read(self) -> Array:
        assert self.written.all(), "an input was not written"
        return self.values.copy()

    def write(self, place: object, values: Array) -> None:
        """values: at `place`, an index."""
        self.values[place] = values
        flags = self.driver.space.written(self.address, self._size).reshape(*self.shape, -1)
        flags[place] = True


def run_graph(
    graph: Path,
    tensors: Mapping[str, DeviceTensor],
    inputs: Iterable[str],
    outputs: Iterable[str],
    caches: Mapping[str, str],
) -> None:
    """inputs, outputs: names of the engine's. caches: inputs that are written, and the graph's outputs for them."""
    feeds = {name: tensors[name].read() for name in inputs if name not in caches and name != "page_table"}
    places: dict[str, Places | Rows] = {}
    if caches:
        pages = Places.of(feeds, tensors["page_table"])
        places = {name: Rows.of(feeds) if "_state." in name else pages for name in caches}
        feeds["page_table"] = pages.table
        feeds |= {name: place.kept(tensors[name]) for name, place in places.items()}
    plain = [name for name in outputs if name not in CANDIDATE_OUTPUTS]
    values = session(str(graph), graph.stat().st_mtime_ns).run([*plain, *caches.values()], feeds)
    found = dict(zip([*plain, *caches], values, strict=True))
    for name, place in places.items():
        place.write(tensors[name], feeds[name], found.pop(name))
    if "logits" in found:
        logits = found["logits"]
        found |= zip(CANDIDATE_OUTPUTS, candidates(logits, min(CANDIDATES, logits.shape[1])), strict=True)
    for name in outputs:
        tensors[name].write(..., found[name])


@dataclass(frozen=True)
class Places:
    """Where a step's tokens lie. table: [N, M] int32, columns that nobody needs are 0.

    past, own: (pages, slots) of tokens that were kept before the step, and of those that it writes; int32.
    """

    table: Array
    past: tuple[Array, Array]
    own: tuple[Array, Array]

    @classmethod
    def of(cls, feeds: Mapping[str, Array], tables: DeviceTensor, page_size: int = 64) -> Places:
        """Check that no sequence writes into another's page, and only padding into page 0."""
        starts, kept = feeds["query_start"].tolist(), feeds["context_len"].tolist()
        assert starts[0] == 0
        assert starts[-1] == len(feeds["input_ids"])
        ends = [past + stop - start for past, (start, stop) in zip(kept, pairwise(starts), strict=True)]
        needed = [-(-end // page_size) if end > past else 0 for past, end in zip(kept, ends, strict=True)]
        table = np.zeros((len(kept), max(1, *needed)), np.int32)
        written = tables.written
        past_places, own_places = [], []
        written_pages: list[set[int]] = []
        for n, (past, end, count) in enumerate(zip(kept, ends, needed, strict=True)):
            assert written[n, :count].all(), "a part of a page table was not written"
            table[n, :count] = pages = tables.values[n, :count]
            padding = past == 0 and not pages.any()
            assert padding or (pages > 0).all(), "page 0 in a sequence's table"
            at = np.stack([pages[np.arange(end) // page_size], np.arange(end) % page_size]) if count else _NOWHERE
            past_places.append(at[:, :past])
            own_places.append(at[:, past:])
            written_pages.append(set() if padding else set(at[0, past:].tolist()))
        for n, own in enumerate(written_pages):
            others = np.delete(table, n, axis=0)
            assert not own & set(others.ravel().tolist()), "a sequence writes into another's page"
        return cls(table, *(tuple(np.concatenate(places, axis=1)) for places in (past_places, own_places)))  # type: ignore[arg-type]

    def kept(self, cache: DeviceTensor) -> Array:
        """The cache with what may be read of it, all else zero."""
        pages, slots = self.past
        assert cache.written[pages, :, slots].all(), "a kept token was not written"
        values = np.zeros(cache.shape, cache.dtype)
        values[pages, :, slots] = cache.values[pages, :, slots]
        return values

    def write(self, cache: DeviceTensor, before: Array, after: Array) -> None:
        """Write the step's tokens. before, after: the cache as the graph was given it, and as it left it."""
        pages, slots = self.own
        own = (pages, slice(None), slots)
        cache.write(own, after[own])
        after[own] = before[own]
        np.testing.assert_array_equal(after, before, "the graph wrote elsewhere")


@dataclass(frozen=True)
class Rows:
    """own: rows of a step's sequences in recurrent states; row 0 is padding's, and neither read nor written."""

    own: Array

    @classmethod
    def of(cls, feeds: Mapping[str, Array]) -> Rows:
        rows = feeds["state_row"]
        assert len(set(rows[rows > 0].tolist())) == (rows > 0).sum(), "two sequences have one row"
        return cls(rows[rows > 0])

    def kept(self, state: DeviceTensor) -> Array:
        """The state's own rows, all else zero."""
        assert state.written[self.own].all(), "a row was neither cleared nor written"
        values = np.zeros(state.shape, state.dtype)
        values[self.own] = state.values[self.own]
        return values

    def write(self, state: DeviceTensor, before: Array, after: Array) -> None:
        """Write the step's rows. before, after: the state as the graph was given it, and as it left it."""
        state.write(self.own, after[self.own])
        rest = np.delete(np.arange(1, len(after)), self.own - 1)
        np.testing.assert_array_equal(after[rest], before[rest], "the graph wrote elsewhere")


_NOWHERE = np.zeros((2, 0), np.int32)
