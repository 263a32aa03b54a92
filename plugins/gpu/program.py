"""What a GPU does for one op, as data: compiled kernels and, by the number of tokens, which are launched and how.

The TensorRT plugin is an interpreter of such programs: it knows no model and no kernel. A program reaches it as bytes,
see `Program.to_bytes`; `plugins/tensorrt/program.h` reads them.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from moevlm.runtime.core.dtypes import DTYPES

TOKENS = -1  # in a tensor's shape: the number of tokens T
MAGIC, VERSION = b"MOEVLMGP", 1
NO_LIMIT = (1 << 63) - 1
ALIGNMENT = 256  # of every workspace buffer, in bytes
_FILL = 0xFFFFFFFF
# Of the tensors that a kernel takes.
TENSOR_DTYPES = ("float32", "float16", "int8", "int32", "float8_e4m3fn", "bfloat16")
ARGUMENTS = ("input", "output", "workspace", "tokens", "null", "constant")


@dataclass(frozen=True)
class Tensor:
    """An input or output of the op. dtype: one of TENSOR_DTYPES. shape: with TOKENS for the number of tokens."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """A number that never falls as T rises: min(ceil((slope * T + offset) / divisor), limit_slope * T + limit)."""

    slope: int = 0
    offset: int = 0
    divisor: int = 1
    limit_slope: int = 0
    limit: int = NO_LIMIT

    def at(self, tokens: int) -> int:
        """Its value for so many tokens."""
        value = -(-(self.slope * tokens + self.offset) // self.divisor)
        return min(value, self.limit_slope * tokens + self.limit)


ONE = Count(offset=1)


@dataclass(frozen=True)
class Argument:
    """What a kernel is given.

    kind: the pointer of "input", "output" or "workspace" buffer `index`; "tokens", T as int32; "null", a null pointer;
    "constant", `index` as int32.
    """

    kind: str
    index: int = 0


@dataclass(frozen=True)
class Launch:
    """kernel: which of the image. grid: programs along x, y and z. arguments: one for each parameter."""

    kernel: int
    grid: tuple[Count, Count, Count]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Fill:
    """Set the first `words` 32-bit words of a workspace buffer to `value`."""

    buffer: int
    value: int
    words: Count


@dataclass(frozen=True)
class Variant:
    """Steps in order, for T up to max_tokens; buffers: bytes of each, laid out one after the other in the workspace."""

    max_tokens: int
    buffers: tuple[Count, ...]
    steps: tuple[Launch | Fill, ...]

    def workspace(self, tokens: int) -> int:
        """Bytes of workspace for so many tokens."""
        return sum(-(-buffer.at(tokens) // ALIGNMENT) * ALIGNMENT for buffer in self.buffers)


@dataclass(frozen=True)
class Kernel:
    """entry: its name in `image`, a cubin. shared: dynamic shared memory in bytes. parameters: how many it has."""

    entry: str
    warps: int
    shared: int
    parameters: int
    image: bytes


@dataclass(frozen=True)
class Image:
    """Kernels of one kind of GPU (sm: 86 for compute capability 8.6), and variants by rising max_tokens.

    A cubin runs on its own compute capability alone: those for 90 and up use instructions of that one.
    """

    sm: int
    kernels: tuple[Kernel, ...]
    variants: tuple[Variant, ...]

    def variant(self, tokens: int) -> Variant:
        """The first one that has room for so many tokens. Raises ValueError if none has."""
        for variant in self.variants:
            if tokens <= variant.max_tokens:
                return variant
        raise ValueError(f"{tokens} tokens (allowed: up to {self.variants[-1].max_tokens})")


@dataclass(frozen=True)
class Program:
    """op: MoERouter or MoEExperts. inputs, outputs: what the kernels were compiled for."""

    op: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    images: tuple[Image, ...]

    def to_bytes(self) -> bytes:
        """Little-endian, unpadded. A string or a blob is its length (u32) and its bytes; a list is its length (u32)
        and its items; a Count is five i64.

        MAGIC, version u32, op, inputs, outputs (Tensor: name, dtype u32, shape as a list of i64), images
        (Image: sm u32, kernels, variants; Kernel: entry, warps u32, shared u32, parameters u32, image;
        Variant: max_tokens u32, buffers, steps). A Launch is kernel u32, three Counts, a list of (kind u32, index u32);
        a Fill is 0xFFFFFFFF in the place of the kernel, buffer u32, value u32, Count.
        """
        out = _Writer()
        out.raw(MAGIC)
        out.u32(VERSION)
        out.blob(self.op.encode())
        for tensors in (self.inputs, self.outputs):
            out.u32(len(tensors))
            for tensor in tensors:
                out.blob(tensor.name.encode())
                out.u32(DTYPES[tensor.dtype].tensorrt_number)
                out.u32(len(tensor.shape))
                out.i64(*tensor.shape)
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
        out.u32(variant.max_tokens, len(variant.buffers))
        out.counts(variant.buffers)
        out.u32(len(variant.steps))
        for step in variant.steps:
            if isinstance(step, Fill):
                out.u32(_FILL, step.buffer, step.value)
                out.counts([step.words])
                continue
            out.u32(step.kernel)
            out.counts(step.grid)
            out.u32(len(step.arguments))
            for argument in step.arguments:
                out.u32(ARGUMENTS.index(argument.kind), argument.index)


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

    def counts(self, counts: Iterable[Count]) -> None:
        for count in counts:
            self.i64(count.slope, count.offset, count.divisor, count.limit_slope, count.limit)
