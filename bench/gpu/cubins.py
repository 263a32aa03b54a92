"""Machine code compiled ahead of time, run through the CUDA driver, against the same kernels run by Triton."""

import secrets
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu import launch
from bench.gpu.cases import cases_of, some_ops
from bench.gpu.cases.base import results, worst
from bench.gpu.driver import CubinRunner
from bench.gpu.facts import launcher_missing
from moevlm.plugins.gpu.compiler import compile_program, resources
from moevlm.plugins.gpu.ops.base import KernelOp


def run(sm: int) -> Iterator[dict[str, Any]]:
    """An entry per op: whether the bits are the same, or else how far apart, and what its kernels take.

    Where Triton cannot launch, the checks have run the machine code.
    """
    if why := launcher_missing():
        yield {"kind": "cubins", "skipped": why}
        return
    for op in some_ops(sm):
        yield compare(op, sm)


def compare(op: KernelOp, sm: int) -> dict[str, Any]:
    """Both ways for sizes that use every variant of the draft."""
    cases, seed = cases_of(op), secrets.randbelow(1 << 31)
    entry: dict[str, Any] = {"kind": "cubins", "op": cases.describe(op), "seed": seed}
    try:
        program, draft = compile_program(op, [sm]), op.draft(sm)
        runner = CubinRunner(program, sm)
        furthest, same = 0.0, True
        for call in cases.calls(draft):
            drawn = cases.case(op, call, seed).inputs
            found = []
            for run in (runner.run, lambda inputs: launch.run(draft, inputs)):
                inputs = [tensor.cuda() for tensor in drawn]
                outputs = run(inputs)
                found.append((outputs, results(op, inputs, outputs)))
            (ours, mine), (others, theirs) = found
            same &= all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
            furthest = max(furthest, worst(mine, theirs))
        runner.close()
        taken = resources(op, [sm])
        entry |= {"same_bits": same, "worst": furthest, "allowed": cases.allowed(op)}
        entry |= {"registers": max(r.registers for r in taken), "spilled": max(r.spilled for r in taken)}
        entry["shared"] = max(r.shared for r in taken)
        if not furthest <= entry["allowed"]:
            entry["error"] = f"off by {furthest:.2g}"
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return entry
