"""Recorded launches, run through Triton's interpreter on real memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.plugins.gpu.draft import Draft, KernelSpec
from moevlm.plugins.gpu.program import ALIGNMENT, Argument, Image, Kernel, Launch, Program
from tests.plugins.tensorrt.fake_cuda import Event, image

GUARD = 4096
SCRATCH = (Argument("null"),) * 2  # Triton appends two pointers to every kernel


def fake_program(draft: Draft) -> Program:
    """As the compiler makes it of a draft, but with images for the recording driver. Kernels are called by number."""
    kernels = tuple(
        Kernel(str(i), spec.warps, 0, len(spec.types) + 2, image(str(i), (*spec.types, "*i8", "*i8")))
        for i, spec in enumerate(draft.kernels)
    )
    variants = []
    for variant in draft.variants:
        steps = tuple(
            Launch(step.kernel, step.grid, step.arguments + SCRATCH) if isinstance(step, Launch) else step
            for step in variant.steps
        )
        variants.append(type(variant)(variant.bounds, variant.buffers, steps))
    return Program(draft.op, draft.inputs, draft.outputs, (Image(draft.sm, kernels, tuple(variants)),))


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
class Call:
    """A launch of a kernel, or with None a fill: its place, value and words."""

    kernel: KernelSpec | None
    grid: tuple[int, ...]
    arguments: tuple[Place | int | None, ...]


def calls(events: Sequence[Event], kernels: Sequence[KernelSpec], memory: Memory) -> list[Call]:
    """What the driver recorded, without addresses."""
    made = []
    for event in events:
        values: Mapping = event.values
        if event.call == "cuMemsetD32Async":
            made.append(Call(None, (), (memory.place(values["address"]), values["value"], values["words"])))
        elif event.call == "cuLaunchKernel":
            spec = kernels[int(values["entry"])]
            assert values["block"] == [32 * spec.warps, 1, 1]
            *given, first, second = values["arguments"]
            assert first == second == 0
            arguments = tuple(
                (memory.place(value) if value else None) if kind.startswith("*") else value
                for kind, value in zip(spec.types, given, strict=True)
            )
            made.append(Call(spec, tuple(values["grid"]), arguments))
    return made


def replay(made: Sequence[Call], blocks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The memory's blocks after these calls. To be run in the interpreter's process."""
    import torch

    from bench.gpu.launch import launch

    torch.set_num_threads(1)
    dtypes = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32}
    dtypes["*i8"] = torch.int8
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
        arguments = [
            tensor(given, dtypes[kind]) if isinstance(given, Place) else given
            for kind, given in zip(call.kernel.types, call.arguments, strict=True)
        ]
        launch(call.kernel, call.grid, arguments)
    return [block.numpy() for block in memory]
