"""The kernels themselves, in Triton's interpreter. Only where TRITON_INTERPRET=1 was set."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np

from tests.plugins.tensorrt.fake_cuda import Event
from tests.support.fakes.cuda_driver import Work
from tests.support.simulator.machine import PluginCall
from tests.support.simulator.memory import Memory
from tests.support.simulator.program import spec_of
from tests.support.simulator.sanitizer import run_kernel, watched


class InterpretedKernels:
    """launches: how many of each kernel ran."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

    def work(self, memory: Memory, call: PluginCall) -> list[Work]:
        """See `Kernels`."""
        caches = [one for name, one in zip(call.node.inputs, call.inputs, strict=True) if "_cache." in name]
        page_0 = [(one.address, one.address + one.size // one.shape[0]) for one in caches]
        return [partial(self._run, memory, event, page_0) for event in call.events]

    def _run(self, memory: Memory, event: Event, page_0: list[tuple[int, int]]) -> None:
        values = event.values
        if event.call == "cuMemsetD32Async":
            memory.write(values["address"], np.full(values["words"], values["value"], np.uint32))
            return
        assert event.call in ("cuLaunchKernel", "cuLaunchKernelEx"), event
        spec = spec_of(values["entry"])
        *arguments, first, second = values["arguments"]
        assert first == second == 0
        assert values["block"] == [32 * spec.warps, 1, 1]
        self.launches[spec.function] += 1
        with watched(memory):
            run_kernel(memory, spec, tuple(values["grid"]), arguments, page_0)
