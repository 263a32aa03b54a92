"""Runs a Draft through Triton: on a GPU, or on a CPU in a process started with TRITON_INTERPRET=1."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from moevlm.plugins.gpu import kernels
from moevlm.plugins.gpu.constants import as_constants
from moevlm.plugins.gpu.draft import Draft, KernelSpec
from moevlm.plugins.gpu.program import ALIGNMENT, Argument, Fill, chosen
from moevlm.plugins.gpu.sizes import SYMBOLS, Sizes, Tensor, sizes_of
from moevlm.runtime.core.dtypes import DTYPES

_INTERPRETED = {"INTERPRETED": True, "OVERLAPS": False}  # what Triton's interpreter makes of kernels' constants


def launch(spec: KernelSpec, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Launch one kernel.

    arguments: one for each of spec.types: a tensor, what `described` made, a number, or None for a null pointer.
    """
    constants = dict(spec.constants)
    if knobs.runtime.interpret:
        constants |= {name: value for name, value in _INTERPRETED.items() if name in constants}
    else:
        constants = as_constants(constants)
    getattr(kernels, spec.function)[grid](*arguments, **constants, num_warps=spec.warps, num_stages=spec.stages)


def described(array: torch.Tensor, shape: Sequence[int], kind: str) -> TensorDescriptor:
    """The array that begins where another does, for a parameter of this type: "tensordesc<bf16[1, 64, 64]>"."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    block = [int(size) for size in kind[kind.index("[") + 1 : kind.index("]")].split(",")]
    return TensorDescriptor(array.reshape(-1)[: math.prod(shape)], list(shape), strides, block)


def run(draft: Draft, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The op's outputs. inputs: as draft.inputs states them, all on one device; those that it says are written are.

    The workspace is what the draft asks for; it and the outputs start as garbage: every word is all ones. Raises
    ValueError where an input is not of the stated dtype or shape, or no variant holds.
    """
    sizes = _check(draft.inputs, inputs)
    device = inputs[0].device
    outputs = [torch.empty(t.at(sizes), dtype=getattr(torch, t.dtype), device=device) for t in draft.outputs]
    for output in outputs:
        output.view(torch.uint8).fill_(0xFF)
    variant = chosen(draft.variants, sizes)
    workspace = torch.full((variant.workspace(sizes),), 0xFF, dtype=torch.uint8, device=device)
    buffers, offset = [], 0
    for size in variant.buffers:
        buffers.append(workspace[offset : offset + size.at(sizes)])
        offset += -(-size.at(sizes) // ALIGNMENT) * ALIGNMENT

    def value(argument: Argument, kind: str) -> Any:
        if argument.kind in ("input", "output"):
            return (inputs if argument.kind == "input" else outputs)[argument.index]
        if argument.kind == "workspace":
            buffer, dtype = buffers[argument.index], _DTYPES[kind]
            return buffer[: len(buffer) // dtype.itemsize * dtype.itemsize].view(dtype)
        if argument.kind == "symbol":
            return sizes[SYMBOLS[argument.index]]
        if argument.kind == "tensor_map":
            tensor = variant.maps[argument.index]
            array = value(tensor.source, DTYPES[tensor.dtype].pointer).view(getattr(torch, tensor.dtype))
            return described(array, tensor.shape(sizes), kind)
        return {"null": None, "constant": argument.index}[argument.kind]

    for step in variant.steps:
        if isinstance(step, Fill):
            buffers[step.buffer].view(torch.int32)[: step.words.at(sizes)] = step.value
            continue
        spec = draft.kernels[step.kernel]
        arguments = [value(a, kind) for a, kind in zip(step.arguments, spec.types, strict=True)]
        launch(spec, tuple(count.at(sizes) for count in step.grid), arguments)
    return outputs


_DTYPES = {DTYPES[name].pointer: getattr(torch, name) for name in ("int8", "int32", "float16", "bfloat16", "float32")}


def _check(expected: Sequence[Tensor], given: Sequence[torch.Tensor]) -> Sizes:
    for tensor, stated in zip(given, expected, strict=True):
        if (found := str(tensor.dtype)[6:]) != stated.dtype or not tensor.is_contiguous():
            raise ValueError(f"{stated.name}: {found} (allowed: {stated.dtype}, contiguous)")
    return sizes_of(expected, [tuple(tensor.shape) for tensor in given])
