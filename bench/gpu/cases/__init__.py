"""Every op that is checked: a line each."""

from bench.gpu.cases.base import Cases
from bench.gpu.cases.candidates import CandidatesCases
from bench.gpu.cases.experts import ExpertsCases
from bench.gpu.cases.paged_attention import PagedAttentionCases
from bench.gpu.cases.router import RouterCases
from bench.gpu.cases.segment_attention import SegmentAttentionCases
from moevlm.plugins.gpu.ops.base import KernelOp

CASES: tuple[Cases, ...] = (
    PagedAttentionCases(),
    SegmentAttentionCases(),
    CandidatesCases(),
    ExpertsCases(),
    RouterCases(),
)


def cases_of(op: KernelOp) -> Cases:
    """Those of an op's kind."""
    return next(cases for cases in CASES if isinstance(op, cases.kind))


def all_ops(sm: int) -> list[KernelOp]:
    """Of every kind."""
    return [op for cases in CASES for op in cases.ops(sm)]


def some_ops(sm: int) -> list[KernelOp]:
    """Of every kind some, for what takes longer."""
    return [op for cases in CASES for op in cases.ops(sm)[:: cases.step]]
