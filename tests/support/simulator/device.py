"""A GPU with TensorRT-RTX in this process: the fakes' driver and TensorRT, and engines that are simulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.plugin_harness import PluginLibrary
from tests.plugins.tensorrt.fake_cuda import FakeCuda
from tests.support.fakes.cuda_driver import Driver
from tests.support.fakes.gpu import FakeGpu, fake_gpu
from tests.support.simulator.engine import SimulatedEngine
from tests.support.simulator.graph import Graph
from tests.support.simulator.libraries import Libraries
from tests.support.simulator.machine import Kernels, Machine
from tests.support.simulator.memory import Memory


@dataclass(frozen=True)
class SimulatedGpu:
    """gpu: of the fakes. machine: what its engines run on."""

    gpu: FakeGpu
    machine: Machine


@contextmanager
def simulated_gpu(
    folder: Path, libraries: Libraries, kernels: Kernels, sm: int = 89, **options: Any
) -> Iterator[SimulatedGpu]:
    """Within the block this machine has a GPU. folder: see `fake_gpu`. options: of the driver."""
    machine = Machine(
        Memory(),
        PluginLibrary(libraries.plugins, libraries.harness),
        FakeCuda(libraries.driver),
        kernels,
        sm,
    )

    def evaluation(_: Driver, plan: dict[str, Any]) -> SimulatedEngine:
        return SimulatedEngine(machine, Graph(Path(plan["graph"])), plan["ranges"])

    try:
        with fake_gpu(folder, evaluation, sm=divmod(sm, 10), space=machine.memory, **options) as gpu:
            yield SimulatedGpu(gpu, machine)
    finally:
        machine.close()
