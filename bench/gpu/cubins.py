"""Machine code compiled ahead of time, run through the CUDA driver, against the same kernels run by Triton."""

import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.gpu import launch
from bench.gpu.cases import (
    ALLOWED,
    Op,
    describe,
    deviation,
    experts_case,
    experts_ops,
    router_case,
    router_ops,
    token_counts,
)
from bench.gpu.driver import CubinRunner
from bench.gpu.facts import launcher_missing
from moevlm.plugins.gpu.compiler import compile_program, resources
from moevlm.plugins.gpu.ops.experts import ExpertsOp

ROUTERS = 6
MOST_TOKENS = 1000


def run(sm: int) -> Iterator[dict[str, Any]]:
    """An entry per op: whether the bits are the same, or else how far apart, and what its kernels take.

    Where Triton cannot launch, the checks have run the machine code.
    """
    if why := launcher_missing():
        yield {"kind": "cubins", "skipped": why}
        return
    routers = router_ops()
    for op in [*experts_ops(sm)[::2], *routers[:: len(routers) // ROUTERS]]:
        yield compare(op, sm)


def inputs_of(op: Op, tokens: int, seed: int) -> list[torch.Tensor]:
    """Fresh inputs on the device, in the op's order."""
    if isinstance(op, ExpertsOp):
        given = experts_case(op, tokens, seed)[0]
    else:
        arrays = router_case(op, tokens, seed)
        given = [torch.from_numpy(arrays[tensor.name]) for tensor in op.inputs]
    return [tensor.cuda() for tensor in given]


def compare(op: Op, sm: int) -> dict[str, Any]:
    """Both ways for numbers of tokens that use every variant of the draft."""
    seed = secrets.randbelow(1 << 31)
    entry: dict[str, Any] = {"kind": "cubins", "op": describe(op), "seed": seed}
    try:
        program, draft = compile_program(op, [sm]), op.draft(sm)
        runner = CubinRunner(program, sm)
        worst, same = 0.0, True
        for tokens in token_counts(draft):
            if tokens > MOST_TOKENS:
                continue
            inputs = inputs_of(op, tokens, seed)
            for ours, other in zip(runner.run(inputs), launch.run(draft, inputs), strict=True):
                same &= bool(torch.equal(ours, other))
                worst = max(worst, deviation(*(part.double().cpu().numpy() for part in (ours, other))))
        runner.close()
        taken = resources(op, [sm])
        allowed = ALLOWED[op.dtype if isinstance(op, ExpertsOp) else "float32"]
        entry |= {"same_bits": same, "worst": worst, "allowed": allowed}
        entry |= {"registers": max(r.registers for r in taken), "spilled": max(r.spilled for r in taken)}
        entry["shared"] = max(r.shared for r in taken)
        if not worst <= allowed or not np.isfinite(worst):
            entry["error"] = f"off by {worst:.2g}"
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return entry
