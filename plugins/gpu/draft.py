"""A program before it is compiled: which kernels an op needs on a GPU, and how they are launched."""

from collections.abc import Hashable
from dataclasses import dataclass

from moevlm.plugins.gpu.program import Variant
from moevlm.plugins.gpu.sizes import LARGEST_SIZES, Tensor

MAX_TOKENS = LARGEST_SIZES["T"]  # that programs have room for
ADA = 89  # the first SM that multiplies e4m3
HOPPER = 90  # the first that has launches that overlap, and tensor maps


@dataclass(frozen=True)
class KernelSpec:
    """A Triton function and all that it is specialised to.

    function: its name in `moevlm.plugins.gpu.kernels`. types: Triton's names of its run-time parameters, which come
    first ("*bf16", "*i32", "i32"; "tensordesc<bf16[1, 128, 64]>" for a tensor map with such blocks, from SM 9.0 on);
    pointers are aligned to 16 bytes. constants: its constexpr parameters by name, numbers, strings, and frozen
    dataclasses of such, which a kernel reads field by field.
    """

    function: str
    types: tuple[str, ...]
    constants: tuple[tuple[str, Hashable], ...]
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Draft:
    """Launches name kernels by their place in `kernels`, and one argument for each of their `types`."""

    op: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sm: int
    kernels: tuple[KernelSpec, ...]
    variants: tuple[Variant, ...]


def power_of_two(n: int) -> int:
    """The smallest that is n or more."""
    return 1 << (n - 1).bit_length()
