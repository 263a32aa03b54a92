"""The plugin library on the GPU: its enqueue, called as TensorRT would, against the spec."""

import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import cases_of, some_ops
from bench.gpu.cases.base import Case, results
from bench.gpu.driver import POISON, empty_outputs
from bench.plugin_harness import Io, Plugin, PluginLibrary, compile_harness, compile_library, compiler
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.program import Program
from moevlm.plugins.gpu.sizes import Sizes, sizes_of

FOLDER = Path(__file__).parents[2] / "build" / "check"
GUARD_BYTES, GUARD = 1 << 16, 0xA5  # behind the workspace; nothing may be written there


def run(sm: int) -> Iterator[dict[str, Any]]:
    """An entry per op: the worst deviation over several sizes, launched directly and replayed from a graph."""
    if shutil.which(compiler()) is None:
        yield {"kind": "plugin", "skipped": f"{compiler()}, which compiles it, is not installed"}
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, harness = compile_library(FOLDER / "plugin.so"), compile_harness(FOLDER / "harness.so")
    library = PluginLibrary(path, harness)
    torch.zeros(1, device="cuda")  # makes the context, which the library takes as it is
    for op in some_ops(sm):
        yield check(op, library, sm)


def check(op: KernelOp, library: PluginLibrary, sm: int, device: str = "cuda") -> dict[str, Any]:
    """One op as an engine has it: built, configured for all its sizes, run in a context of its own.

    device: "cpu" where the library's driver does not look at what tensors hold.
    """
    cases, seed = cases_of(op), secrets.randbelow(1 << 31)
    entry: dict[str, Any] = {"kind": "plugin", "op": cases.describe(op), "seed": seed}
    try:
        program, draft = compile_program(op, [sm]), op.draft(sm)
        pairs = [[cases.case(op, call, seed + i) for i in range(2)] for call in cases.calls(draft)]
        least, most = range_of(program, [first for first, _ in pairs])
        built = library.plugin(op.name, program.to_bytes())
        profile = Io.of(program.inputs, program.outputs, least, most)
        built.configure(profile)
        plugin, size = built.attach(), built.workspace(profile)
        worst = max(_run(op, program, plugin, size, pair, device) for pair in pairs)
        plugin.close()
        built.close()
    except Exception as error:
        return entry | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    entry |= {"worst": worst, "allowed": cases.allowed(op), "workspace": size}
    return entry if worst <= entry["allowed"] else entry | {"error": f"off by {worst:.2g}"}


def range_of(program: Program, cases: Sequence[Case]) -> tuple[Sizes, Sizes]:
    """The least and the most of each symbol over the cases, as an optimization profile has them."""
    found = [_sizes(program, case) for case in cases]
    return tuple({name: end(sizes[name] for sizes in found) for name in found[0]} for end in (min, max))


def _sizes(program: Program, case: Case) -> Sizes:
    return sizes_of(program.inputs, [tuple(tensor.shape) for tensor in case.inputs])


def _run(op: KernelOp, program: Program, plugin: Plugin, size: int, pair: Sequence[Case], device: str) -> float:
    """The worst deviation of a direct call and of a replayed graph, for cases of the same sizes."""
    sizes = _sizes(program, pair[0])
    io = Io.of(program.inputs, program.outputs, sizes)
    inputs = [tensor.to(device) for tensor in pair[0].inputs]
    outputs = empty_outputs(program, sizes, device)
    workspace = torch.full((size + GUARD_BYTES,), POISON, dtype=torch.uint8, device=device)
    workspace[size:] = GUARD
    plugin.shape_change(io)

    def enqueue() -> None:
        addresses = [tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs]
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        plugin.enqueue(io, *addresses, workspace.data_ptr(), stream)

    enqueue()
    found = [pair[0].deviation(results(op, inputs, outputs))]
    replay = _recorded(enqueue) if device == "cuda" else enqueue
    for target, source in zip(inputs, pair[1].inputs, strict=True):
        target.copy_(source)
    for tensor in (*outputs, workspace[:size]):
        tensor.view(torch.uint8).fill_(POISON)
    replay()
    found.append(pair[1].deviation(results(op, inputs, outputs)))
    if not bool((workspace[size:] == GUARD).all()):
        raise RuntimeError(f"{dict(sizes)}: written beyond the {size} bytes of workspace asked for")
    return max(found)


def _recorded(work: Callable[[], None]) -> Callable[[], None]:
    """What queues the same again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
