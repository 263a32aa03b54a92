"""Every op that is checked: a line each."""

from collections.abc import Sequence

from bench.gpu.cases.base import Cases
from bench.gpu.cases.candidates import CandidatesCases
from bench.gpu.cases.cross_attention import CrossAttentionCases
from bench.gpu.cases.experts import ExpertsCases
from bench.gpu.cases.gated_delta import GatedDeltaCases
from bench.gpu.cases.paged_attention import PagedAttentionCases
from bench.gpu.cases.router import RouterCases
from bench.gpu.cases.segment_attention import SegmentAttentionCases
from moevlm.plugins.gpu.ops.base import KernelOp

CASES: tuple[Cases, ...] = (
    PagedAttentionCases(),
    GatedDeltaCases(),
    SegmentAttentionCases(),
    CrossAttentionCases(),
    CandidatesCases(),
    ExpertsCases(),
    RouterCases(),
)


def cases_of(op: KernelOp) -> Cases:
    """Those of an op's kind."""
    return next(cases for cases in CASES if isinstance(op, cases.kind))


def all_ops(sm: int) -> list[KernelOp]:
    """Of every kind, in turn: where time runs out, a part of each has been checked."""
    return _in_turn([cases.ops(sm) for cases in CASES])


def some_ops(sm: int) -> list[KernelOp]:
    """Of every kind some, for what takes longer, in turn as well."""
    return _in_turn([cases.ops(sm)[:: cases.step] for cases in CASES])


def _in_turn(kinds: Sequence[Sequence[KernelOp]]) -> list[KernelOp]:
    """All, at any place about as large a part of one kind as of another."""
    places = [(i / len(ops), kind, i) for kind, ops in enumerate(kinds) for i in range(len(ops))]
    return [kinds[kind][i] for _, kind, i in sorted(places)]
