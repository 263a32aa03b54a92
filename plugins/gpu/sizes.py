"""Sizes that are known only when an op runs, and what follows from them: shapes of tensors, numbers, bounds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Of the tensors that a kernel takes.
TENSOR_DTYPES = ("float32", "float16", "int8", "int32", "float8_e4m3fn", "bfloat16")
# What is known only when an op runs: T tokens (or patches, or rows), N sequences (or images), M columns of a page
# table, P pages, or rows of recurrent states.
SYMBOLS = ("T", "N", "M", "P")
Sizes = Mapping[str, int]  # the value of each symbol that an op has
# The plugin takes no more, so that grids and buffers of variants without bounds are in range, too.
LARGEST_SIZES: Sizes = {"T": 1 << 20, "N": 1 << 16, "M": (1 << 31) - 1, "P": (1 << 31) - 1}


@dataclass(frozen=True)
class Symbol:
    """A dimension: the value of a symbol, and `plus` more."""

    name: str
    plus: int = 0

    def __add__(self, more: int) -> "Symbol":
        return Symbol(self.name, self.plus + more)

    def __str__(self) -> str:
        return f"{self.name} + {self.plus}" if self.plus else self.name


T, N, M, P = map(Symbol, SYMBOLS)
Dim = int | Symbol


@dataclass(frozen=True)
class Tensor:
    """An input or output of the op. dtype: one of TENSOR_DTYPES. written: an input that the kernels write in place."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    written: bool = False

    def at(self, sizes: Sizes) -> tuple[int, ...]:
        """Its shape for such sizes."""
        return tuple(sizes[dim.name] + dim.plus if isinstance(dim, Symbol) else dim for dim in self.shape)


def sizes_of(tensors: Iterable[Tensor], shapes: Iterable[tuple[int, ...]]) -> dict[str, int]:
    """The value of each symbol, from the first of the tensors that has it. Raises ValueError where a shape differs."""
    sizes: dict[str, int] = {}
    for tensor, shape in zip(tensors, shapes, strict=True):
        if len(shape) == len(tensor.shape):
            for dim, given in zip(tensor.shape, shape, strict=True):
                if isinstance(dim, Symbol):
                    sizes.setdefault(dim.name, given - dim.plus)
        if len(shape) != len(tensor.shape) or shape != tensor.at(sizes):
            allowed = ", ".join(map(str, tensor.shape))
            raise ValueError(f"{tensor.name} has the shape {list(shape)} (allowed: [{allowed}] with {sizes})")
    return sizes


@dataclass(frozen=True)
class Linear:
    """offset + T * tokens + N * sequences + M * columns + P * pages."""

    offset: int = 0
    T: int = 0
    N: int = 0
    M: int = 0
    P: int = 0

    @property
    def slopes(self) -> dict[str, int]:
        """Of each symbol, those that are 0 left out."""
        return {name: slope for name in SYMBOLS if (slope := getattr(self, name))}

    def at(self, sizes: Sizes) -> int:
        """Its value for such sizes."""
        return self.offset + sum(slope * sizes[name] for name, slope in self.slopes.items())


@dataclass(frozen=True)
class Count:
    """A number that never falls as a size rises: ceil(value / divisor), at most `limit`. No slope is negative."""

    value: Linear
    divisor: int = 1
    limit: Linear | None = None

    def at(self, sizes: Sizes) -> int:
        """Its value for such sizes."""
        value = -(-self.value.at(sizes) // self.divisor)
        return value if self.limit is None else min(value, self.limit.at(sizes))


def fixed(number: int) -> Count:
    """The same for every size."""
    return Count(Linear(number))


def per_token(slope: int, offset: int = 0, divisor: int = 1, limit: Linear | None = None) -> Count:
    """ceil((slope * T + offset) / divisor), at most `limit`."""
    return Count(Linear(offset, T=slope), divisor, limit)


ONE = fixed(1)


def at_most(most: int, symbol: str = "T") -> Linear:
    """The bound of a variant for up to so many tokens, or another symbol's number."""
    return Linear(-most, **{symbol: 1})
