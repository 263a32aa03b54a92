"""The plugin library on the GPU: its enqueue, called as TensorRT would, against the spec."""

import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.cases import ALLOWED, Op, describe, deviation, experts_case, experts_ops, router_case, router_ops
from bench.gpu.driver import POISON, empty_outputs
from bench.plugin_harness import Io, Plugin, PluginLibrary, compile_harness, compile_library, compiler
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.program import Program
from moevlm.plugins.ops.router import route

FOLDER = Path(__file__).parents[2] / "build" / "check"
MOST_TOKENS = 1024  # of the optimization profile
TOKENS = (1, 8, 9, 130, MOST_TOKENS)
GUARD_BYTES, GUARD = 1 << 16, 0xA5  # behind the workspace; nothing may be written there
EXPERTS_STEP, ROUTERS = 3, 4


def run(sm: int) -> Iterator[dict[str, Any]]:
    """An entry per op: the worst deviation over numbers of tokens, launched directly and replayed from a graph."""
    if shutil.which(compiler()) is None:
        yield {"kind": "plugin", "skipped": f"{compiler()}, which compiles it, is not installed"}
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, harness = compile_library(FOLDER / "plugin.so"), compile_harness(FOLDER / "harness.so")
    library = PluginLibrary(path, harness)
    routers = router_ops()
    torch.zeros(1, device="cuda")  # makes the context, which the library takes as it is
    for op in [*experts_ops(sm)[::EXPERTS_STEP], *routers[:: len(routers) // ROUTERS]]:
        yield check(op, library, sm)


def check(op: Op, library: PluginLibrary, sm: int) -> dict[str, Any]:
    """One op as an engine has it: built, configured for 1 to MOST_TOKENS, run in a context of its own."""
    seed = secrets.randbelow(1 << 31)
    entry: dict[str, Any] = {"kind": "plugin", "op": describe(op), "seed": seed}
    try:
        program = compile_program(op, [sm])
        built = library.plugin(op.name, program.to_bytes())
        profile = Io.of(program.inputs, program.outputs, {"T": 1}, {"T": MOST_TOKENS})
        built.configure(profile)
        plugin, size = built.attach(), built.workspace(profile)
        worst = max(_run(op, program, plugin, size, tokens, seed) for tokens in TOKENS)
        plugin.close()
        built.close()
    except Exception as error:
        return entry | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    allowed = ALLOWED[op.dtype if isinstance(op, ExpertsOp) else "float32"]
    entry |= {"worst": worst, "allowed": allowed, "workspace": size}
    return entry if worst <= allowed else entry | {"error": f"off by {worst:.2g}"}


def _run(op: Op, program: Program, plugin: Plugin, size: int, tokens: int, seed: int) -> float:
    """The worst deviation of a direct call and of a replayed graph, for inputs of their own."""
    io = Io.of(program.inputs, program.outputs, {"T": tokens})
    cases = [_case(op, tokens, seed + i) for i in range(2)]
    inputs = [tensor.cuda() for tensor in cases[0][0]]
    outputs = empty_outputs(program, {"T": tokens})
    workspace = torch.full((size + GUARD_BYTES,), POISON, dtype=torch.uint8, device="cuda")
    workspace[size:] = GUARD
    plugin.shape_change(io)

    def enqueue() -> None:
        addresses = [tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs]
        plugin.enqueue(io, *addresses, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)

    enqueue()
    found = [_deviation(outputs, cases[0][1])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    for target, source in zip(inputs, cases[1][0], strict=True):
        target.copy_(source)
    for tensor in (*outputs, workspace[:size]):
        tensor.view(torch.uint8).fill_(POISON)
    graph.replay()
    found.append(_deviation(outputs, cases[1][1]))
    if not bool((workspace[size:] == GUARD).all()):
        raise RuntimeError(f"{tokens} tokens: written beyond the {size} bytes of workspace asked for")
    return max(found)


def _case(op: Op, tokens: int, seed: int) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """(inputs, outputs by the spec)."""
    if isinstance(op, ExpertsOp):
        inputs, y = experts_case(op, tokens, seed)
        return inputs, [y]
    arrays = router_case(op, tokens, seed)
    expected = route(arrays["logits"], op.spec, arrays.get("bias"))
    return [torch.from_numpy(arrays[tensor.name]) for tensor in op.inputs], list(expected)


def _deviation(outputs: Sequence[torch.Tensor], expected: Sequence[np.ndarray]) -> float:
    """The worst of the outputs. A router's index counts as one of them: near ties are rarer than this is run."""
    return max(deviation(o.double().cpu().numpy(), e) for o, e in zip(outputs, expected, strict=True))
