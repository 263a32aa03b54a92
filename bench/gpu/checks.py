"""Every variant of the kernels against the spec in numpy, on fresh random inputs."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    near_ties,
    router_case,
    router_ops,
    token_counts,
)
from bench.gpu.driver import CubinRunner
from bench.gpu.facts import launcher_missing
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.ops.router import route

ROUTER_TOKENS = (1, 7, 300)
SKEWED_FROM = 9  # tokens that are all sent to the same experts, too
Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]  # an op's inputs -> its outputs


def run(sm: int, shard: int = 0, shards: int = 1) -> Iterator[dict[str, Any]]:
    """An entry per op of this shard: the worst deviation over numbers of tokens, and what was wrong."""
    ops: list[Op] = [*experts_ops(sm), *router_ops()]
    for op in ops[shard::shards]:
        yield check(op, sm, "cuda")


def check(op: Op, sm: int, device: str) -> dict[str, Any]:
    """Run the op for numbers of tokens that use all of its plan, each with inputs that nobody has seen."""
    seed = secrets.randbelow(1 << 31)
    entry: dict[str, Any] = {"kind": "check", "op": describe(op), "seed": seed}
    try:
        draft = op.draft(sm)
        with _running(op, draft, device) as run:
            if isinstance(op, ExpertsOp):
                return entry | _experts(op, draft, run, seed, device)
            return entry | _router(op, run, seed, device)
    except Exception as error:
        return entry | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


@contextmanager
def _running(op: Op, draft: Draft, device: str) -> Iterator[Run]:
    """What runs the op: Triton's launcher or, where a GPU's machine has none, the machine code that a program has."""
    if device == "cpu" or not launcher_missing():
        yield lambda inputs: launch.run(draft, inputs)
        return
    runner = CubinRunner(compile_program(op, [draft.sm]), draft.sm)
    try:
        yield lambda inputs: runner.run(inputs)
    finally:
        runner.close()


def _experts(op: ExpertsOp, draft: Draft, run: Run, seed: int, device: str) -> dict[str, Any]:
    allowed = ALLOWED[op.dtype]
    found: dict[str, float] = {}
    for tokens in token_counts(draft):
        for skewed in (False, True) if tokens >= SKEWED_FROM else (False,):
            inputs, expected = experts_case(op, tokens, seed, skewed)
            (y,) = run([tensor.to(device) for tensor in inputs])
            found[f"{tokens}{' skewed' if skewed else ''}"] = deviation(y.float().cpu().numpy(), expected)
    return _verdict(found, allowed)


def _router(op: RouterOp, run: Run, seed: int, device: str) -> dict[str, Any]:
    allowed = ALLOWED["float32"]
    found: dict[str, float] = {}
    ties = 0
    for tokens in ROUTER_TOKENS:
        inputs = router_case(op, tokens, seed)
        given = [torch.from_numpy(inputs[tensor.name]).to(device) for tensor in op.inputs]
        index, weight = (output.cpu().numpy() for output in run(given))
        expected_index, expected_weight = route(inputs["logits"], op.spec, inputs.get("bias"))
        other = (index != expected_index).any(axis=1)
        steady = ~near_ties(inputs, op.spec, seed)
        if (other & steady).any():
            token = int(np.flatnonzero(other & steady)[0])
            chosen = f"{index[token].tolist()} (the spec: {expected_index[token].tolist()})"
            raise ValueError(f"token {token} of {tokens} chooses {chosen}")
        ties += int(other.sum())
        found[str(tokens)] = deviation(weight[~other], expected_weight[~other]) if (~other).any() else 0.0
    return _verdict(found, allowed) | {"near_ties": ties}


def _verdict(found: dict[str, float], allowed: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"tokens": list(found), "worst": max(found.values(), default=0.0), "allowed": allowed}
    wrong = {tokens: value for tokens, value in found.items() if not value <= allowed}
    if wrong:
        entry["error"] = "; ".join(f"{tokens} tokens: off by {value:.2g}" for tokens, value in wrong.items())
    return entry
