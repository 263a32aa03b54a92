"""Every variant of the kernels against the spec in numpy, on fresh random inputs."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bench.gpu import launch
from bench.gpu.cases import all_ops, cases_of
from bench.gpu.cases.base import results
from bench.gpu.driver import CubinRunner
from bench.gpu.facts import launcher_missing
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.base import KernelOp

Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]  # an op's inputs -> its outputs


def run(sm: int, shard: int = 0, shards: int = 1) -> Iterator[dict[str, Any]]:
    """An entry per op of this shard: the worst deviation over several sizes, and what was wrong."""
    for op in all_ops(sm)[shard::shards]:
        yield check(op, sm, "cuda")


def check(op: KernelOp, sm: int, device: str) -> dict[str, Any]:
    """Run the op for sizes that use all of its draft, each with inputs that nobody has seen."""
    cases, seed = cases_of(op), secrets.randbelow(1 << 31)
    entry: dict[str, Any] = {"kind": "check", "op": cases.describe(op), "seed": seed}
    try:
        draft, allowed = op.draft(sm), cases.allowed(op)
        found: dict[str, float] = {}
        with _running(op, draft, device) as run:
            for call in cases.calls(draft):
                case = cases.case(op, call, seed)
                inputs = [tensor.to(device) for tensor in case.inputs]
                found[str(call)] = case.deviation(results(op, inputs, run(inputs)))
    except Exception as error:
        return entry | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    entry |= {"calls": list(found), "worst": max(found.values(), default=0.0), "allowed": allowed}
    if wrong := {call: value for call, value in found.items() if not value <= allowed}:
        entry["error"] = "; ".join(f"{call}: off by {value:.2g}" for call, value in wrong.items())
    return entry


@contextmanager
def _running(op: KernelOp, draft: Draft, device: str) -> Iterator[Run]:
    """What runs the op: Triton's launcher or, where a GPU's machine has none, the machine code that a program has."""
    if device == "cpu" or not launcher_missing():
        yield lambda inputs: launch.run(draft, inputs)
        return
    runner = CubinRunner(compile_program(op, [draft.sm]), draft.sm)
    try:
        yield runner.run
    finally:
        runner.close()
