"""What ops are specified to do, in numpy, in the place of kernels: their launches are checked, and not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from moevlm.plugins.gpu.ops.base import KernelOp
from tests.support.fakes.cuda_driver import Work
from tests.support.plugin_nodes import NODES, written_rows
from tests.support.simulator.machine import Binding, PluginCall
from tests.support.simulator.memory import Memory, MemoryFault
from tests.support.simulator.program import spec_of

_COMPUTED: dict[str, Any] = {node.__name__: node.computed for node in NODES if hasattr(node, "computed")}
SCALE_BYTES = 4


class SpecifiedKernels:
    """launches: how many of each kernel there were."""

    def __init__(self, ops: Mapping[bytes, KernelOp]) -> None:
        """ops: by program."""
        self._ops = ops
        self.launches: Counter[str] = Counter()

    def work(self, memory: Memory, call: PluginCall) -> list[Work]:
        """See `Kernels`."""
        ranges = [(one.address, one.size) for one in (*call.inputs, *call.outputs)] + [call.workspace]
        for event in call.events:
            if event.call == "cuMemsetD32Async":
                _require_inside(event.values["address"], 4 * event.values["words"], [call.workspace])
                continue
            spec = spec_of(event.values["entry"])
            self.launches[spec.function] += 1
            for kind, value in zip(spec.types, event.values["arguments"], strict=False):
                if kind.startswith("*") and value:
                    _require_inside(value, 1, ranges)
        return [partial(self._compute, memory, call)]

    def _compute(self, memory: Memory, call: PluginCall) -> None:
        op = self._ops[call.node.program]
        bound = dict(zip((tensor.name for tensor in op.inputs), call.inputs, strict=True))
        caches = {tensor.name: bound[tensor.name] for tensor in op.inputs if tensor.written}
        arrays = {name: _array(memory, one, name not in caches) for name, one in bound.items()}
        if caches and op.name == "GatedDelta":
            _write_states(memory, caches, arrays)
        elif caches:
            _write_rows(memory, op, caches, arrays)
        for one, array in zip(call.outputs, _COMPUTED[op.name](None, op, arrays), strict=True):
            memory.write(one.address, array)


def _require_inside(address: int, size: int, ranges: list[tuple[int, int]]) -> None:
    if not any(start <= address and address + size <= start + length for start, length in ranges):
        raise MemoryFault(f"a launch has an address {address:#x} that is in no tensor of its plugin")


def _array(memory: Memory, one: Binding, written: bool) -> np.ndarray:
    if written:
        return memory.read(one.address, one.shape, one.dtype)
    return memory.view(one.address, one.size).view(one.dtype).reshape(one.shape)


def _write_rows(memory: Memory, op: Any, caches: Mapping[str, Binding], step: Mapping[str, np.ndarray]) -> None:
    """Note what a step writes. Raises MemoryFault if it reads a row that was not written."""
    page_size = op.page_size
    lengths = step["context_len"] + np.diff(step["query_start"])
    for name, one in caches.items():
        for flags in _row_flags(memory.written(one.address, one.size), one, op.cache):
            for page, row in written_rows(dict(step), page_size):
                flags[page, :, row] = True
            for n, length in enumerate(lengths.tolist()):
                for position in range(length):
                    page = int(step["page_table"][n, position // page_size])
                    if not flags[page, :, position % page_size].all():
                        raise MemoryFault(
                            f"{name} of sequence {n}: place {position}, in page {page}, was never written"
                        )


def _write_states(memory: Memory, states: Mapping[str, Binding], step: Mapping[str, np.ndarray]) -> None:
    """Note which rows a step writes. Raises MemoryFault if one was neither written nor cleared."""
    rows = step["state_row"][np.diff(step["query_start"]) > 0]
    for name, one in states.items():
        flags = memory.written(one.address, one.size).reshape(one.shape[0], -1)
        for row in rows[rows > 0].tolist():
            if not flags[row].all():
                raise MemoryFault(f"{name}: row {row} was never written")


def _row_flags(written: np.ndarray, cache: Binding, kind: str) -> list[np.ndarray]:
    """Views of the bytes of a cache's rows, [P, heads, page, bytes]; codes and scales lie apart."""
    pages, heads, page, width = cache.shape
    blocks = written.reshape(pages, heads, page * width * cache.dtype.itemsize)
    if not kind:
        return [blocks.reshape(pages, heads, page, -1)]
    codes = page * (width - SCALE_BYTES)
    return [blocks[..., :codes].reshape(pages, heads, page, -1), blocks[..., codes:].reshape(pages, heads, page, -1)]
