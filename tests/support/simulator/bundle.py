"""A bundle with a TensorRT-RTX engine: the real build, but for TensorRT itself and for the compiling of kernels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from moevlm.export.backends.tensorrt import options, worker
from moevlm.export.backends.tensorrt.plan_builder import Built, Job
from moevlm.export.build import add_targets
from moevlm.export.writing.streamed_file import StreamedFile
from moevlm.plugins.gpu import compiler, tiles
from moevlm.plugins.gpu.ops import paged_attention_draft
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.program import Program
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.progress import Progress
from tests.support.fakes.tensorrt_runtime import VERSION, plan_bytes
from tests.support.simulator.program import compile_nothing

_TENSORRT = {dtype.onnx: dtype.tensorrt for dtype in DTYPES.values()}
_TILES = json.loads(Path(__file__).with_name("tiles.json").read_text())


TARGET = "rtx:sm89:fp16"


@dataclass(frozen=True)
class SimulatedBundle:
    """One with an engine TARGET for the simulator. ops: that were compiled for it, by program."""

    path: Path
    ops: dict[bytes, KernelOp]


def with_simulated_engine(
    bundle: Path, checkpoint: Path, folder: Path, sequences: int = 8, chunk_tokens: int = 128
) -> SimulatedBundle:
    """A copy of a bundle, in a new folder, with an engine whose activations are float32: rounding hides nothing."""
    copy = Path(shutil.copytree(bundle, folder / "simulated.moevlm"))
    graphs = folder / "graphs"
    graphs.mkdir()
    with simulated_build(graphs, exact=True) as ops:
        add_targets(copy, checkpoint, ["rtx:sm89"], dtype="fp16", max_sequences=sequences, chunk_tokens=chunk_tokens)
    return SimulatedBundle(copy, ops)


@contextmanager
def simulated_build(folder: Path, exact: bool = False) -> Iterator[dict[bytes, KernelOp]]:
    """Within the block engines are built for the simulator: yields the ops that were compiled, by program.

    folder: for their graphs, for as long as they are used. exact: fp16 means float32, so that rounding hides nothing.
    """
    ops: dict[bytes, KernelOp] = {}
    real = compiler.compile_program

    def compile_program(op: KernelOp, *rest: Any) -> Program:
        program = real(op, *rest)
        ops[program.to_bytes()] = op
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run", lambda job, progress: _build(job, progress, folder))
        if exact:
            patch.setitem(options.DTYPES, "fp16", "float32")
        patch.setattr(compiler, "_compile", compile_nothing)
        patch.setattr(compiler, "compile_program", compile_program)
        table = {
            family: found | _TILES | {"attention": found["attention"] | _TILES["attention"]}
            for family, found in tiles.table().items()
        }
        patch.setattr(tiles, "table", lambda: table)
        patch.setattr(paged_attention_draft, "FEWEST_SHARES", 2)  # each is a program, which takes its time here
        yield ops


def _build(job: Job, progress: Progress, folder: Path) -> Built:
    """As `worker.run`: a plan of the fake TensorRT-RTX that names the graph."""
    assert job.product == "tensorrt_rtx"
    source = Path(job.onnx)
    number = len(list(folder.iterdir()))
    graph = folder / str(number) / source.name
    graph.parent.mkdir()
    for file in source.parent.glob(f"{source.name}*"):
        shutil.copy(file, graph.parent)
    model = onnx.load(graph, load_external_data=False).graph
    inputs = {value.name: _input(value, job.profiles) for value in model.input}
    outputs = {value.name: (_dtype(value), _shape(value)) for value in model.output}
    plan = plan_bytes(graph, inputs, outputs, len(job.profiles), list(job.sms), ranges=job.profiles)
    file = StreamedFile(Path(job.plan))
    try:
        file.write(plan)
        progress(1, 1)
        return Built(VERSION, file.close())
    finally:
        file.abort()


def _input(value: onnx.ValueInfoProto, profiles: Sequence[Mapping[str, Any]]) -> tuple[str, list[int], Any]:
    """As `plan_bytes` takes it."""
    ranges = [profile[value.name] for profile in profiles if value.name in profile]
    assert len(ranges) in (0, len(profiles))
    shape = _shape(value)
    assert bool(ranges) == (-1 in shape), value.name
    return _dtype(value), shape, [largest for _, _, largest in ranges] or None


def _dtype(value: onnx.ValueInfoProto) -> str:
    return _TENSORRT[value.type.tensor_type.elem_type]


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    """-1 where it is open."""
    return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
