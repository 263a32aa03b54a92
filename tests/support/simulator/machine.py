"""The machine that simulated engines run on, and who does the work of their plugins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bench.plugin_harness import PluginLibrary
from tests.plugins.tensorrt.fake_cuda import Event, FakeCuda
from tests.support.fakes.cuda_driver import Work
from tests.support.simulator.graph import PluginNode
from tests.support.simulator.memory import Memory


@dataclass(frozen=True)
class Binding:
    """A tensor of a call: where it lies, and what."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PluginCall:
    """What a plugin did when it was enqueued. events: its calls of the driver. workspace: its address and size."""

    node: PluginNode
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    events: tuple[Event, ...]
    workspace: tuple[int, int]


class Kernels(Protocol):
    """Who does the work of a plugin."""

    def work(self, memory: Memory, call: PluginCall) -> list[Work]:
        """In order, to be done any number of times."""
        ...


class Machine:
    """What simulated engines run on: a GPU of compute capability sm / 10 and one CUDA context."""

    def __init__(self, memory: Memory, library: PluginLibrary, cuda: FakeCuda, kernels: Kernels, sm: int) -> None:
        self.memory, self.library, self.cuda, self.kernels = memory, library, cuda, kernels
        cuda.set_sm(sm)
        self._context = cuda.context()

    def enter(self) -> None:
        """Make the CUDA context this thread's."""
        self.cuda.use(self._context)

    def close(self) -> None:
        """The end of the context."""
        self.cuda.use(None)
        self.cuda.destroy(self._context)
