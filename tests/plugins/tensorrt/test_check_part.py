"""The part of the check on a GPU that calls the plugin library, on the recording driver, which computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from bench.gpu import plugin
from bench.gpu.cases import base, cases_of
from bench.gpu.cases.experts import ExpertsCall
from bench.gpu.cases.paged_attention import SequencesCall
from bench.plugin_harness import PluginLibrary
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.candidates import CandidatesOp
from moevlm.plugins.gpu.ops.cross_attention import CrossAttentionOp
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from moevlm.plugins.gpu.program import Image, Kernel, Program
from moevlm.plugins.ops.spec import AttentionSpec, ExpertsSpec, RouterSpec
from tests.plugins.tensorrt.fake_cuda import FakeCuda, image


def fake_program(op: KernelOp, sms: Sequence[int]) -> Program:
    """With images that the recording driver takes."""
    (sm,) = sms
    draft = op.draft(sm)
    kernels = tuple(
        Kernel(spec.function, spec.warps, 0, len(spec.types), image(spec.function, spec.types))
        for spec in draft.kernels
    )
    return Program(draft.op, draft.inputs, draft.outputs, (Image(sm, kernels, draft.variants),))


@pytest.fixture(autouse=True)
def _fake_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "compile_program", fake_program)


ATTENTION = PagedAttentionOp(AttentionSpec(2, 1, 16), 16, 16, "float16", "int8", has_norms=True)
MIXTURES = [SequencesCall(((70, 1),)), SequencesCall(((3, 5), (0, 1)))]


@pytest.mark.parametrize(
    ("op", "calls"),
    [
        (RouterOp(RouterSpec(top_k=2), 6), [1, 5]),
        (ExpertsOp(ExpertsSpec(), 4, 2, 32, 24, "float16", "int8", 32), [ExpertsCall(1), ExpertsCall(600)]),
        (CandidatesOp(300), [1, 3]),
        (SegmentAttentionOp(1, 20, "float16"), [(4,), (9, 0, 7)]),
        (CrossAttentionOp(3, 1, 20, "float16"), [(4,), (9, 1, 7)]),
        (ATTENTION, MIXTURES),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_call_reaches_the_driver_twice(
    library: PluginLibrary, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, op: KernelOp, calls: list[Any]
) -> None:
    """Right results are put in the place of those that no kernel has written."""
    cuda.set_sm(90)
    cases, judged = cases_of(op), []
    case = cases.case

    def trusting(op: KernelOp, call: Any, seed: int) -> base.Case:
        def deviation(found: base.Arrays) -> float:
            judged.append([array.shape for array in found])
            return 0.0

        return base.Case(case(op, call, seed).inputs, deviation)

    monkeypatch.setattr(cases, "case", trusting)
    monkeypatch.setattr(cases, "calls", lambda *_: calls)
    entry = plugin.check(op, library, 90, "cpu")
    assert "error" not in entry, entry["error"]
    assert len(judged) == 2 * len(calls)
    assert all(len(shapes) == len(op.outputs) + sum(tensor.written for tensor in op.inputs) for shapes in judged)
    launches = [event for event in cuda.events() if event.call.startswith("cuLaunchKernel")]
    assert len(launches) >= 2 * len(calls)


def test_what_no_kernel_has_written_is_found(library: PluginLibrary, cuda: FakeCuda) -> None:
    cuda.set_sm(90)
    entry = plugin.check(SegmentAttentionOp(1, 20, "float16"), library, 90, "cpu")
    assert entry["error"] == "off by inf"
