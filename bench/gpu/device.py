"""Where a part measures: this machine's GPU."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from bench.gpu.driver import CubinRunner
from bench.gpu.timing import median_seconds
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.ops.base import KernelOp


class Call(Protocol):
    """An op on given tensors: calling it launches its kernels."""

    outputs: list[torch.Tensor]

    def __call__(self) -> None: ...


class Runner(Protocol):
    """An op's machine code, loaded until `close`."""

    def prepare(self, inputs: Sequence[torch.Tensor]) -> Call: ...
    def close(self) -> None: ...


class Device:
    """name: torch's. What parts ask of it, so that they also run where kernels are interpreted and nothing is timed."""

    name = "cuda"

    def __init__(self, sm: int) -> None:
        self.sm = sm

    @property
    def dtype(self) -> str:
        """Of activations."""
        return "bfloat16" if self.sm >= 80 else "float16"

    @property
    def free(self) -> int:
        """Bytes of memory."""
        torch.cuda.empty_cache()  # or what torch keeps of earlier tensors would not count
        return torch.cuda.mem_get_info()[0]

    @property
    def stream(self) -> int:
        """The current one."""
        return torch.cuda.current_stream().cuda_stream

    def runner(self, op: KernelOp) -> Runner:
        """The machine code that an engine carries."""
        return CubinRunner(compile_program(op, [self.sm]), self.sm)

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """The median time of one of the calls, which take turns."""
        return median_seconds(calls)

    def wait(self) -> None:
        """For all that was launched."""
        torch.cuda.synchronize()
