"""Runs a program's machine code through the CUDA driver: the plugin's work, by a second reader of the same data."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moevlm.plugins.gpu.program import ALIGNMENT, Fill, Image, Kernel, Program, TensorMap, Variant
from moevlm.plugins.gpu.sizes import SYMBOLS, Sizes, sizes_of
from moevlm.runtime.core.dtypes import DTYPES

POISON = 0xFF  # in every byte that a kernel has yet to write: no number in any floating-point format
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_WITHOUT_OPTING_IN = 48 * 1024
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_ELEMENT_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9, "int32": 3}  # CUtensorMapDataType; others are bytes


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, of those whose value is an int."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )

    def __init__(self, number: int, value: int) -> None:
        super().__init__(id=number, value=value)


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig. sizes: of the grid, of a block, and bytes of dynamic shared memory."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Pointers:
    """Addresses on the device; workspace: of the whole."""

    inputs: Sequence[int]
    outputs: Sequence[int]
    workspace: int


@dataclass(frozen=True)
class Set:
    """Fill words from an address on."""

    address: int
    value: int
    words: int


@dataclass(frozen=True)
class Call:
    """A launch with its numbers: arguments are 8-byte pointers, 4-byte integers, or tensors to make maps of.

    overlaps: it may begin while the one before it ends.
    """

    kernel: int
    grid: tuple[int, ...]
    arguments: "tuple[ctypes.c_void_p | ctypes.c_int32 | Mapped, ...]"
    overlaps: bool = False


@dataclass(frozen=True)
class Mapped:
    """A tensor that a kernel takes as a map."""

    described: TensorMap
    address: int
    shape: tuple[int, ...]


def empty_outputs(program: Program, sizes: Sizes, device: str = "cuda") -> list[torch.Tensor]:
    """A program's outputs, holding poison."""
    outputs = []
    for tensor in program.outputs:
        outputs.append(torch.empty(tensor.at(sizes), dtype=getattr(torch, tensor.dtype), device=device))
        outputs[-1].view(torch.uint8).fill_(POISON)
    return outputs


def resolve(variant: Variant, sizes: Sizes, pointers: Pointers) -> list[Set | Call]:
    """The variant's steps for such sizes."""
    buffers, at = [], pointers.workspace
    for buffer in variant.buffers:
        buffers.append(at)
        at += -(-buffer.at(sizes) // ALIGNMENT) * ALIGNMENT
    places = {"input": pointers.inputs, "output": pointers.outputs, "workspace": buffers}
    steps: list[Set | Call] = []
    for step in variant.steps:
        if isinstance(step, Fill):
            steps.append(Set(buffers[step.buffer], step.value, step.words.at(sizes)))
            continue
        arguments: list[ctypes.c_void_p | ctypes.c_int32 | Mapped] = []
        for argument in step.arguments:
            if argument.kind in places:
                arguments.append(ctypes.c_void_p(places[argument.kind][argument.index]))
            elif argument.kind == "tensor_map":
                tensor = variant.maps[argument.index]
                address = places[tensor.source.kind][tensor.source.index]
                arguments.append(Mapped(tensor, address, tensor.shape(sizes)))
            elif argument.kind == "null":
                arguments.append(ctypes.c_void_p(None))
            else:
                symbol = argument.kind == "symbol"
                arguments.append(ctypes.c_int32(sizes[SYMBOLS[argument.index]] if symbol else argument.index))
        grid = tuple(count.at(sizes) for count in step.grid)
        steps.append(Call(step.kernel, grid, tuple(arguments), step.overlaps))
    return steps


@dataclass(frozen=True)
class Prepared:
    """A program's steps on given tensors, which it keeps alive. Calling it launches them."""

    runner: "CubinRunner"
    steps: Sequence[Set | Call]
    outputs: list[torch.Tensor]
    kept: tuple[torch.Tensor, ...]

    def __call__(self) -> None:
        for step in self.steps:
            self.runner.launch(step)


class CubinRunner:
    """One image of a program, loaded into the current context. `close` unloads it."""

    def __init__(self, program: Program, sm: int, device: str = "cuda", driver: str = "libcuda.so.1") -> None:
        """device: where outputs and workspaces are made. driver: the CUDA driver, a shared library."""
        self._program, self._device = program, device
        self._image: Image = next(image for image in program.images if image.sm == sm)
        self._cuda = ctypes.CDLL(driver)
        self._modules: list[ctypes.c_void_p] = []
        torch.zeros(1, device=device)  # makes the context
        self._functions = [self._load(kernel) for kernel in self._image.kernels]

    def _check(self, what: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: error {code}, {(text.value or b'unknown').decode()}")

    def _load(self, kernel: Kernel) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(f"loading {kernel.entry}", self._cuda.cuModuleLoadData(ctypes.byref(module), kernel.image))
        self._modules.append(module)
        entry = kernel.entry.encode()
        self._check(kernel.entry, self._cuda.cuModuleGetFunction(ctypes.byref(function), module, entry))
        if kernel.shared > _WITHOUT_OPTING_IN:
            code = self._cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, kernel.shared)
            self._check(f"{kernel.shared} bytes of shared memory for {kernel.entry}", code)
        return function

    def prepare(self, inputs: Sequence[torch.Tensor]) -> "Prepared":
        """What runs the op on these inputs, as often as it is called, on the stream current then."""
        sizes = sizes_of(self._program.inputs, [tuple(tensor.shape) for tensor in inputs])
        variant = self._image.variant(sizes)
        outputs = empty_outputs(self._program, sizes, self._device)
        size = max(variant.workspace(sizes), 1)
        workspace = torch.full((size,), POISON, dtype=torch.uint8, device=self._device)
        pointers = Pointers([t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs], workspace.data_ptr())
        return Prepared(self, resolve(variant, sizes, pointers), outputs, (*inputs, workspace))

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The op's outputs; they and the workspace hold poison before."""
        prepared = self.prepare(inputs)
        prepared()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return prepared.outputs

    def launch(self, step: "Set | Call") -> None:
        """One step, on the current stream."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if self._device == "cuda" else None)
        if isinstance(step, Set):
            if not step.words:
                return
            address, value = ctypes.c_uint64(step.address), ctypes.c_uint32(step.value)
            code = self._cuda.cuMemsetD32Async(address, value, ctypes.c_size_t(step.words), stream)
            self._check("filling memory", code)
        elif 0 not in step.grid:
            self._launch(step, stream)

    def _launch(self, call: Call, stream: ctypes.c_void_p) -> None:
        kernel = self._image.kernels[call.kernel]
        arguments = [self._map(each) if isinstance(each, Mapped) else each for each in call.arguments]
        addresses = [ctypes.addressof(argument) for argument in arguments]
        function, given = self._functions[call.kernel], (ctypes.c_void_p * len(addresses))(*addresses)
        sizes = (*call.grid, 32 * kernel.warps, 1, 1, kernel.shared)
        if call.overlaps:
            overlaps = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 1)
            config = _LaunchConfig((ctypes.c_uint * 7)(*sizes), stream, ctypes.pointer(overlaps), 1)
            code = self._cuda.cuLaunchKernelEx(ctypes.byref(config), function, given, None)
        else:
            code = self._cuda.cuLaunchKernel(function, *map(ctypes.c_uint, sizes), stream, given, None)
        self._check(f"launching {kernel.entry}", code)

    def _map(self, tensor: Mapped) -> ctypes.Array[ctypes.c_char]:
        """A CUtensorMap: 128 bytes, aligned to 64. The driver counts dimensions from the last one on."""
        room = (ctypes.c_char * (128 + 64))()
        made = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
        width, rank = DTYPES[tensor.described.dtype].bytes, len(tensor.shape)
        strides = [width * math.prod(tensor.shape[-i:]) for i in range(1, rank)]
        code = self._cuda.cuTensorMapEncodeTiled(
            made,
            _ELEMENT_TYPES.get(tensor.described.dtype, 0),
            rank,
            ctypes.c_void_p(tensor.address),
            (ctypes.c_uint64 * rank)(*reversed(tensor.shape)),
            (ctypes.c_uint64 * rank)(*strides),
            (ctypes.c_uint32 * rank)(*reversed(tensor.described.block)),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,  # not interleaved
            (0, 32, 64, 128).index(tensor.described.swizzle),
            2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
            0,  # zeros beyond the array
        )
        self._check("a tensor map", code)
        return made

    def close(self) -> None:
        for module in self._modules:
            self._cuda.cuModuleUnload(module)
        self._modules.clear()
