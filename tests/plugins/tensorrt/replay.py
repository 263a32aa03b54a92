"""Recorded launches, run through Triton's interpreter on real memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bench.plugin_harness import Io, PluginLibrary
from moevlm.plugins.gpu.draft import Draft, KernelSpec
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.program import ALIGNMENT, Argument, Image, Kernel, Launch, Program
from moevlm.plugins.gpu.sizes import TENSOR_DTYPES, Sizes, Tensor, sizes_of
from moevlm.runtime.core.dtypes import DTYPES
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.tensorrt.fake_cuda import Event, FakeCuda, image

GUARD = 4096
SCRATCH = (Argument("null"),) * 2  # Triton appends two pointers to every kernel


def fake_program(draft: Draft) -> Program:
    """As the compiler makes it of a draft, but with images for the recording driver. Kernels are called by number."""
    kernels = tuple(
        Kernel(str(i), spec.warps, 0, len(spec.types) + 2, image(str(i), (*_parameters(spec), "*i8", "*i8")))
        for i, spec in enumerate(draft.kernels)
    )
    variants = []
    for variant in draft.variants:
        steps = tuple(
            replace(step, arguments=step.arguments + SCRATCH) if isinstance(step, Launch) else step
            for step in variant.steps
        )
        variants.append(replace(variant, steps=steps))
    return Program(draft.op, draft.inputs, draft.outputs, (Image(draft.sm, kernels, tuple(variants)),))


def _parameters(spec: KernelSpec) -> list[str]:
    return ["map" if kind.startswith("tensordesc") else kind for kind in spec.types]


@dataclass(frozen=True)
class Place:
    """An address: so many bytes into a block of memory."""

    block: int
    offset: int


class Memory:
    """Blocks of memory of this process, which stand for the GPU's."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def add(self, data: np.ndarray) -> int:
        """A copy of its bytes, aligned; the address."""
        block = self._new(data.nbytes)
        block[:] = data.reshape(-1).view(np.uint8)
        return block.ctypes.data

    def reserve(self, size: int) -> int:
        """Bytes that are all ones; the address."""
        block = self._new(size)
        block[:] = 0xFF
        return block.ctypes.data

    def _new(self, size: int) -> np.ndarray:
        room = np.empty(size + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        self.blocks.append(room[start : start + size])
        return self.blocks[-1]

    def place(self, address: int) -> Place:
        """Raises LookupError for an address of no block."""
        for i, block in enumerate(self.blocks):
            if 0 <= address - block.ctypes.data < len(block):
                return Place(i, address - block.ctypes.data)
        raise LookupError(f"nothing is at address {address}")


@dataclass(frozen=True)
class Mapped:
    """An array that a kernel takes as a tensor map."""

    place: Place
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """A launch of a kernel, or with None a fill: its place, value and words."""

    kernel: KernelSpec | None
    grid: tuple[int, ...]
    arguments: tuple[Place | Mapped | int | None, ...]


def calls(events: Sequence[Event], kernels: Sequence[KernelSpec], memory: Memory) -> list[Call]:
    """What the driver recorded, without addresses."""
    made = []
    for event in events:
        values: Mapping = event.values
        if event.call == "cuMemsetD32Async":
            made.append(Call(None, (), (memory.place(values["address"]), values["value"], values["words"])))
        elif event.call in ("cuLaunchKernel", "cuLaunchKernelEx"):
            spec = kernels[int(values["entry"])]
            assert values["block"] == [32 * spec.warps, 1, 1]
            *given, first, second = values["arguments"]
            assert first == second == 0
            arguments = tuple(_argument(kind, value, memory) for kind, value in zip(spec.types, given, strict=True))
            made.append(Call(spec, tuple(values["grid"]), arguments))
    return made


def _argument(kind: str, value: Any, memory: Memory) -> Place | Mapped | int | None:
    if kind.startswith("tensordesc"):
        return Mapped(memory.place(value["address"]), tuple(reversed(value["sizes"])))
    if kind.startswith("*"):
        return memory.place(value) if value else None
    return value


def replay(made: Sequence[Call], blocks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The memory's blocks after these calls. To be run in the interpreter's process."""
    from bench.gpu.launch import described, launch

    torch.set_num_threads(1)
    dtypes = {DTYPES[name].pointer: getattr(torch, name) for name in TENSOR_DTYPES}
    memory = [torch.from_numpy(block.copy()) for block in blocks]

    def tensor(place: Place, dtype: torch.dtype) -> torch.Tensor:
        rest = memory[place.block][place.offset :]
        return rest[: len(rest) // dtype.itemsize * dtype.itemsize].view(dtype)

    for call in made:
        if call.kernel is None:
            place, value, words = call.arguments
            assert isinstance(place, Place)
            tensor(place, torch.int32)[:words] = np.uint32(value).astype(np.int32).item()
            continue
        arguments: list[Any] = []
        for kind, given in zip(call.kernel.types, call.arguments, strict=True):
            if isinstance(given, Mapped):
                dtype = dtypes["*" + kind[len("tensordesc<") : kind.index("[")]]
                arguments.append(described(tensor(given.place, dtype), given.shape, kind))
            else:
                arguments.append(tensor(given, dtypes[kind]) if isinstance(given, Place) else given)
        launch(call.kernel, call.grid, arguments)
    return [block.numpy() for block in memory]


def execute(
    library: PluginLibrary,
    cuda: FakeCuda,
    interpreter: Interpreter,
    op: KernelOp,
    inputs: Mapping[str, np.ndarray],
    sm: int,
    largest: Sizes | None = None,
    draft: Draft | None = None,
) -> dict[str, np.ndarray]:
    """What the op's plugin does to these inputs, run as TensorRT would: its outputs by name, and its written inputs.

    inputs: each is rounded to the dtype that the op states. Values in floating point come back as float32. largest: of
    the optimization profile, the inputs' own sizes by default. draft: another than the op's own. Inputs that are not
    written must not change, and nothing may be written beyond an output or the workspace that the plugin asked for.
    """
    cuda.set_sm(sm)
    draft = draft or op.draft(sm)
    sizes = sizes_of(op.inputs, [inputs[tensor.name].shape for tensor in op.inputs])
    plugin = library.plugin(op.name, fake_program(draft).to_bytes())
    profile = Io.of(op.inputs, op.outputs, dict.fromkeys(sizes, 1), largest or sizes)
    plugin.configure(profile)
    reported = plugin.workspace(profile)
    memory = Memory()
    given = [memory.add(_bytes(inputs[tensor.name], tensor)) for tensor in op.inputs]
    made = [memory.reserve(_size(tensor, sizes) + GUARD) for tensor in op.outputs]
    workspace = memory.reserve(reported + GUARD)
    context = plugin.attach()
    io = Io.of(op.inputs, op.outputs, sizes)
    context.shape_change(io)
    cuda.events()
    context.enqueue(io, given, made, workspace)
    launched = calls(cuda.events(), draft.kernels, memory)
    context.close()
    plugin.close()
    blocks = interpreter.call(replay, launched, memory.blocks)
    lengths = [*(_size(tensor, sizes) for tensor in (*op.inputs, *op.outputs)), reported]
    for block, length in zip(blocks[len(given) :], lengths[len(given) :], strict=True):
        assert (block[length:] == 0xFF).all(), "a kernel wrote beyond its memory"
    results = {}
    for tensor, block, before in zip((*op.inputs, *op.outputs), blocks, memory.blocks, strict=False):
        if tensor.written or tensor in op.outputs:
            results[tensor.name] = _values(block, tensor, sizes)
        else:
            np.testing.assert_array_equal(block, before, f"{tensor.name} was written")
    return results


def _size(tensor: Tensor, sizes: Sizes) -> int:
    return int(np.prod(tensor.at(sizes))) * DTYPES[tensor.dtype].bytes


def _bytes(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    given = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, tensor.dtype))
    return given.reshape(-1).view(torch.uint8).numpy()


def _values(block: np.ndarray, tensor: Tensor, sizes: Sizes) -> np.ndarray:
    dtype = getattr(torch, tensor.dtype)
    values = torch.from_numpy(block[: _size(tensor, sizes)].copy()).view(dtype).reshape(tensor.at(sizes))
    return (values.float() if dtype.is_floating_point else values).numpy()
