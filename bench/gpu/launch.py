"""Runs a Plan through Triton: on a GPU, or on a CPU in a process started with TRITON_INTERPRET=1."""

from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs

from moevlm.plugins.gpu import kernels
from moevlm.plugins.gpu.plan import KernelSpec, Plan
from moevlm.plugins.gpu.program import ALIGNMENT, TOKENS, Argument, Fill, Tensor, Variant
from moevlm.runtime.core.dtypes import DTYPES


def variant_for(plan: Plan, tokens: int) -> Variant:
    """The plan's first variant with room for so many tokens. Raises ValueError if none has."""
    for variant in plan.variants:
        if tokens <= variant.max_tokens:
            return variant
    raise ValueError(f"{tokens} tokens (allowed: up to {plan.variants[-1].max_tokens})")


def launch(spec: KernelSpec, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Launch one kernel. arguments: one for each of spec.types: a tensor, a number, or None for a null pointer."""
    constants = dict(spec.constants)
    if "INTERPRETED" in constants:
        constants["INTERPRETED"] = bool(knobs.runtime.interpret)
    getattr(kernels, spec.function)[grid](*arguments, **constants, num_warps=spec.warps, num_stages=spec.stages)


def run(plan: Plan, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The op's outputs. inputs: as plan.inputs states them, all on one device.

    The workspace is what the plan asks for; it and the outputs start as garbage: every word is all ones. Raises
    ValueError where an input is not of the stated dtype or shape.
    """
    tokens = _check(plan.inputs, inputs)
    device = inputs[0].device
    outputs = [torch.empty(_shape(t, tokens), dtype=getattr(torch, t.dtype), device=device) for t in plan.outputs]
    for output in outputs:
        output.view(torch.uint8).fill_(0xFF)
    variant = variant_for(plan, tokens)
    workspace = torch.full((variant.workspace(tokens),), 0xFF, dtype=torch.uint8, device=device)
    buffers, offset = [], 0
    for size in variant.buffers:
        buffers.append(workspace[offset : offset + size.at(tokens)])
        offset += -(-size.at(tokens) // ALIGNMENT) * ALIGNMENT

    def value(argument: Argument, kind: str) -> Any:
        if argument.kind in ("input", "output"):
            return (inputs if argument.kind == "input" else outputs)[argument.index]
        if argument.kind == "workspace":
            buffer, dtype = buffers[argument.index], _DTYPES[kind]
            return buffer[: len(buffer) // dtype.itemsize * dtype.itemsize].view(dtype)
        return {"tokens": tokens, "null": None, "constant": argument.index}[argument.kind]

    for step in variant.steps:
        if isinstance(step, Fill):
            buffers[step.buffer].view(torch.int32)[: step.words.at(tokens)] = step.value
            continue
        spec = plan.kernels[step.kernel]
        arguments = [value(a, kind) for a, kind in zip(step.arguments, spec.types, strict=True)]
        launch(spec, tuple(count.at(tokens) for count in step.grid), arguments)
    return outputs


_DTYPES = {DTYPES[name].pointer: getattr(torch, name) for name in ("int32", "float16", "bfloat16", "float32")}


def _shape(tensor: Tensor, tokens: int) -> tuple[int, ...]:
    return tuple(tokens if n == TOKENS else n for n in tensor.shape)


def _check(expected: Sequence[Tensor], given: Sequence[torch.Tensor]) -> int:
    """The number of tokens."""
    tokens = len(given[0])
    for tensor, stated in zip(given, expected, strict=True):
        found, allowed = (str(tensor.dtype)[6:], tuple(tensor.shape)), (stated.dtype, _shape(stated, tokens))
        if found != allowed or not tensor.is_contiguous():
            raise ValueError(f"{stated.name}: {found[0]} {found[1]} (allowed: {allowed[0]} {allowed[1]}, contiguous)")
    return tokens
