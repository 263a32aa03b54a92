"""What it takes to check an op: variants of it, calls of each, and what their results are held to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from moevlm.plugins.gpu.devices import device
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.base import KernelOp

# Relative Frobenius norm of the deviation from the spec in float64, whose inputs are the kernel's own rounded ones.
ALLOWED = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Case:
    """One call. inputs: in the op's order, on the CPU.

    deviation: of the outputs, and then the inputs that the op writes, from the spec. Raises ValueError for a result
    that no rounding explains.
    """

    inputs: list[torch.Tensor]
    deviation: Callable[[Arrays], float]


class Cases(ABC):
    """Of one kind of op. kind: its class. step: parts that take longer check one op in so many.

    sizes: of calls, where they are the same for every draft. The sizes of a call are the op's own matter; printed, they
    say which call it was. roundings: of outputs, how many there are as large as one.
    """

    kind: ClassVar[type]
    step: ClassVar[int]
    sizes: ClassVar[Sequence[Any]]
    roundings: ClassVar[int] = 1

    @abstractmethod
    def every_op(self) -> list[Any]:
        """Ops that between them use every branch of the kernels."""

    def ops(self, sm: int) -> list[Any]:
        """Those of `every_op` that a GPU has the dtypes for."""
        return [op for op in self.every_op() if device(sm).bf16 or "bfloat16" not in {x.dtype for x in op.outputs}]

    @abstractmethod
    def describe(self, op: Any) -> str:
        """An op in one line: what it was specialised to."""

    def allowed(self, op: KernelOp) -> float:
        """The deviation that rounding explains. Whole numbers have none."""
        return self.roundings * max(ALLOWED.get(output.dtype, 0.0) for output in op.outputs)

    def calls(self, draft: Draft) -> Sequence[Any]:  # noqa: ARG002 - a kind whose drafts differ has its own
        """Sizes that use every variant of a draft, the smallest first."""
        return self.sizes

    @abstractmethod
    def case(self, op: Any, call: Any, seed: int) -> Case:
        """A call of such sizes. Its shapes depend on the sizes alone, its numbers on the seed."""


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative Frobenius norm of found - expected; infinite if any of found is not a number.

    Where only zeros are expected, as of one token sent to expert 0, it is 0 or infinite.
    """
    if np.array_equal(found, expected):
        return 0.0
    size = float(np.linalg.norm(expected))
    value = float(np.linalg.norm(found.astype(np.float64) - expected)) / size if size else float("inf")
    return value if np.isfinite(value) else float("inf")


def worst(found: Arrays, expected: Arrays) -> float:
    """The largest deviation of any of the arrays."""
    return max(deviation(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def results(op: KernelOp, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """What a call left, as `Case.deviation` takes it."""
    written = [tensor for tensor, stated in zip(inputs, op.inputs, strict=True) if stated.written]
    return [tensor.double().cpu().numpy() for tensor in (*outputs, *written)]
