"""What a GPU does for one op, as data: compiled kernels and, by the sizes of a call, which are launched and how.

The TensorRT plugin is an interpreter of such programs: it knows no model and no kernel. A program reaches it as bytes,
see `Program.to_bytes`; `plugins/tensorrt/program.h` reads them.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from moevlm.plugins.gpu.sizes import SYMBOLS, Count, Linear, Sizes, Symbol, Tensor
from moevlm.runtime.core.dtypes import DTYPES

MAGIC, VERSION = b"MOEVLMGP", 2
NO_LIMIT = (1 << 63) - 1
ALIGNMENT = 256  # of every workspace buffer, in bytes
_FILL = _NO_SYMBOL = 0xFFFFFFFF
ARGUMENTS = ("input", "output", "workspace", "symbol", "null", "constant", "tensor_map")


@dataclass(frozen=True)
class Argument:
    """What a kernel is given.

    kind: the pointer of "input", "output" or "workspace" buffer `index`; "symbol", the value of SYMBOLS[index] as
    int32; "null", a null pointer; "constant", `index` as int32; "tensor_map", the variant's map `index`.
    """

    kind: str
    index: int = 0


TOKENS = Argument("symbol", SYMBOLS.index("T"))


@dataclass(frozen=True)
class TensorMap:
    """A dense array [rows, *inner] that a kernel loads in blocks, by the tensor memory accelerator of SM 9.0 and up.

    source: the pointer of an input, an output or a workspace buffer. dtype: one of TENSOR_DTYPES. block: elements of a
    load along each dimension, at most 256, as in the type of the kernel's parameter (tensordesc<bf16[1, 128, 64]>).
    swizzle: bytes over which a block's rows are permuted in shared memory, 0, 32, 64 or 128; the compiler sets it.
    """

    source: Argument
    dtype: str
    rows: Linear
    inner: tuple[int, ...]
    block: tuple[int, ...]
    swizzle: int = 0

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of the array, for such sizes."""
        return self.rows.at(sizes), *self.inner


@dataclass(frozen=True)
class Launch:
    """kernel: which of the image. grid: programs along x, y and z. arguments: one for each parameter.

    overlaps: it may begin while what was launched before it ends (programmatic dependent launch, from SM 9.0 on), so
    its kernel waits, by griddepcontrol.wait, before it reads or writes what that one does.
    """

    kernel: int
    grid: tuple[Count, Count, Count]
    arguments: tuple[Argument, ...]
    overlaps: bool = False


@dataclass(frozen=True)
class Fill:
    """Set the first `words` 32-bit words of a workspace buffer to `value`."""

    buffer: int
    value: int
    words: Count


@dataclass(frozen=True)
class Variant:
    """Steps in order, for sizes at which no bound is above 0; buffers: bytes of each, one after the other in memory.

    Variants differ in speed alone: each is right for all sizes that its bounds let through. The plugin
    refuses a program with a grid or buffers out of range at the largest of these, and an optimization profile of which
    no variant lets through everything.
    """

    bounds: tuple[Linear, ...]
    buffers: tuple[Count, ...]
    steps: tuple[Launch | Fill, ...]
    maps: tuple[TensorMap, ...] = ()

    def holds(self, sizes: Sizes) -> bool:
        """Whether it may run for such sizes."""
        return all(bound.at(sizes) <= 0 for bound in self.bounds)

    @property
    def max_tokens(self) -> int:
        """The most tokens that a bound on tokens alone lets through; NO_LIMIT without one."""
        return min((-bound.offset // bound.T for bound in self.bounds if set(bound.slopes) == {"T"}), default=NO_LIMIT)

    def workspace(self, sizes: Sizes) -> int:
        """Bytes of workspace for such sizes."""
        return sum(-(-buffer.at(sizes) // ALIGNMENT) * ALIGNMENT for buffer in self.buffers)


@dataclass(frozen=True)
class Kernel:
    """entry: its name in `image`, a cubin. shared: dynamic shared memory in bytes. parameters: how many it has."""

    entry: str
    warps: int
    shared: int
    parameters: int
    image: bytes


def chosen(variants: Iterable[Variant], sizes: Sizes) -> Variant:
    """The first variant that holds. Raises ValueError if none does."""
    for variant in variants:
        if variant.holds(sizes):
            return variant
    raise ValueError(f"no variant for {', '.join(f'{name} = {value}' for name, value in sizes.items())}")


@dataclass(frozen=True)
class Image:
    """Kernels of one kind of GPU (sm: 86 for compute capability 8.6), and variants, of which the first that holds runs.

    A cubin runs on its own compute capability alone: those for 90 and up use instructions of that one.
    """

    sm: int
    kernels: tuple[Kernel, ...]
    variants: tuple[Variant, ...]

    def variant(self, sizes: Sizes) -> Variant:
        """See `chosen`."""
        return chosen(self.variants, sizes)


@dataclass(frozen=True)
class Program:
    """op: one of the plugins' names. inputs, outputs: what the kernels were compiled for."""

    op: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    images: tuple[Image, ...]

    def to_bytes(self) -> bytes:
        """Little-endian, unpadded. A string or a blob is its length (u32) and its bytes; a list is its length (u32)
        and its items; a truth value is 0 or 1 (u32); a symbol is its place in SYMBOLS (u32).

        MAGIC, version u32, op, inputs, outputs, images.
        Tensor: name, dtype u32, written, shape: a list of (symbol, plus i64), or (0xFFFFFFFF, number i64).
        Linear: offset i64, and the slope of each of SYMBOLS, i64.
        Count: value, divisor i64, whether it has a limit, and if it has, the limit.
        Image: sm u32, kernels, variants. Kernel: entry, warps u32, shared u32, parameters u32, image.
        Variant: bounds, buffers, maps, steps. Argument: kind u32, index u32.
        TensorMap: source, dtype u32, rows, inner: a list of i64, block: a list of u32, swizzle u32.
        Launch: kernel u32, overlaps, three Counts, arguments.
        Fill: 0xFFFFFFFF in the place of the kernel, buffer u32, value u32, Count.
        """
        out = _Writer()
        out.raw(MAGIC)
        out.u32(VERSION)
        out.blob(self.op.encode())
        for tensors in (self.inputs, self.outputs):
            out.u32(len(tensors))
            for tensor in tensors:
                out.blob(tensor.name.encode())
                out.u32(DTYPES[tensor.dtype].tensorrt_number, tensor.written, len(tensor.shape))
                for dim in tensor.shape:
                    symbol, number = (
                        (SYMBOLS.index(dim.name), dim.plus) if isinstance(dim, Symbol) else (_NO_SYMBOL, dim)
                    )
                    out.u32(symbol)
                    out.i64(number)
        out.u32(len(self.images))
        for image in self.images:
            _write_image(out, image)
        return bytes(out.data)


def _write_image(out: "_Writer", image: Image) -> None:
    out.u32(image.sm, len(image.kernels))
    for kernel in image.kernels:
        out.blob(kernel.entry.encode())
        out.u32(kernel.warps, kernel.shared, kernel.parameters)
        out.blob(kernel.image)
    out.u32(len(image.variants))
    for variant in image.variants:
        out.u32(len(variant.bounds))
        for bound in variant.bounds:
            out.linear(bound)
        out.u32(len(variant.buffers))
        out.counts(variant.buffers)
        out.u32(len(variant.maps))
        for tensor in variant.maps:
            out.argument(tensor.source)
            out.u32(DTYPES[tensor.dtype].tensorrt_number)
            out.linear(tensor.rows)
            out.u32(len(tensor.inner))
            out.i64(*tensor.inner)
            out.u32(len(tensor.block), *tensor.block, tensor.swizzle)
        out.u32(len(variant.steps))
        for step in variant.steps:
            if isinstance(step, Fill):
                out.u32(_FILL, step.buffer, step.value)
                out.counts([step.words])
                continue
            out.u32(step.kernel, step.overlaps)
            out.counts(step.grid)
            out.u32(len(step.arguments))
            for argument in step.arguments:
                out.argument(argument)


class _Writer:
    def __init__(self) -> None:
        self.data = bytearray()

    def raw(self, data: bytes) -> None:
        self.data += data

    def u32(self, *values: int) -> None:
        self.data += struct.pack(f"<{len(values)}I", *values)

    def i64(self, *values: int) -> None:
        self.data += struct.pack(f"<{len(values)}q", *values)

    def blob(self, data: bytes) -> None:
        self.u32(len(data))
        self.data += data

    def argument(self, argument: Argument) -> None:
        self.u32(ARGUMENTS.index(argument.kind), argument.index)

    def linear(self, linear: Linear) -> None:
        self.i64(linear.offset, *(getattr(linear, symbol) for symbol in SYMBOLS))

    def counts(self, counts: Iterable[Count]) -> None:
        for count in counts:
            self.linear(count.value)
            self.i64(count.divisor)
            self.u32(count.limit is not None)
            if count.limit is not None:
                self.linear(count.limit)
