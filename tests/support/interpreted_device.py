"""A device of `bench.gpu` without a GPU: kernels are interpreted, and every call takes a millisecond.

In a process started with TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Sequence

import torch

from bench.gpu import launch
from bench.gpu.device import Device
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.base import KernelOp


class Interpreted(Device):
    """See the module's docstring."""

    name = "cpu"
    free = 1 << 30
    stream = 0

    def runner(self, op: KernelOp) -> "Runner":
        return Runner(op.draft(self.sm))

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        calls[0]()
        return 1e-3

    def wait(self) -> None:
        pass


class Runner:
    """Of one op."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def prepare(self, inputs: Sequence[torch.Tensor]) -> "Call":
        return Call(self.draft, inputs)

    def close(self) -> None:
        pass


class Call:
    """Of the op on given inputs."""

    def __init__(self, draft: Draft, inputs: Sequence[torch.Tensor]) -> None:
        self.draft, self.inputs = draft, inputs
        self.outputs: list[torch.Tensor] = []

    def __call__(self) -> None:
        self.outputs = launch.run(self.draft, self.inputs)
