"""Launches that overlap: which do, and that their kernels wait before they touch what others wrote."""

import pytest

from moevlm.plugins.gpu.compiler import KERNELS
from moevlm.plugins.gpu.draft import KernelSpec
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.candidates import CandidatesOp
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from moevlm.plugins.gpu.program import Fill, Launch
from moevlm.plugins.ops.spec import ExpertsSpec
from tests.plugins.gpu.loop_loads import lowered

OP = ExpertsOp(ExpertsSpec(), experts=6, top_k=2, hidden=256, inner=256, weights="fp8", group_size=128)
OPS: tuple[KernelOp, ...] = (OP, SegmentAttentionOp(2, 24), CandidatesOp(9000))
SPECS = {spec.function: spec for op in OPS for spec in op.draft(90).kernels}
DOWN = ("few_down", "single_down")


def before_the_wait(spec: KernelSpec, sm: int) -> list[str]:
    """Instructions up to the wait, in a kernel that has one."""
    # Up to the semicolon, before which some versions of Triton have a space, and behind which some a comment.
    lines = [line.strip().partition(";")[0].rstrip() for line in lowered(KERNELS, spec, sm, "ptx").splitlines()]
    assert lines.count("griddepcontrol.wait") == 1
    first = lines[: lines.index("griddepcontrol.wait")]
    assert "griddepcontrol.launch_dependents" in first
    return first


@pytest.mark.parametrize("name", sorted({*SPECS} - {*DOWN, "segment_attention"}))
def test_a_kernel_waits_before_it_touches_memory(name: str) -> None:
    touching = ("ld.global", "st.", "atom.", "red.", "cp.async", "prefetch")
    assert not [line for line in before_the_wait(SPECS[name], 90) if any(word in line for word in touching)]


@pytest.mark.parametrize("name", DOWN)
def test_down_asks_for_weights_before_it_waits(name: str) -> None:
    first = before_the_wait(SPECS[name], 90)
    assert [line for line in first if "prefetch.global.L2" in line]
    assert not [line for line in first if any(word in line for word in ("st.", "atom.", "red.", "cp.async"))]
    # Indices alone are read.
    assert all(".b32" in line for line in first if "ld.global" in line)


def test_attention_among_patches_finds_its_image_before_it_waits() -> None:
    first = before_the_wait(SPECS["segment_attention"], 90)
    assert not [line for line in first if any(word in line for word in ("st.", "atom.", "red.", "cp.async"))]
    loads = [line for line in first if "ld.global" in line]
    assert loads and all("ld.global.b32" in line for line in loads)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("sm", [90, 100, 120])
def test_every_launch_that_follows_another_of_the_op_overlaps(sm: int, op: KernelOp) -> None:
    for variant in op.draft(sm).variants:
        for before, step in zip((None, *variant.steps), variant.steps, strict=False):
            if isinstance(step, Launch):
                assert step.overlaps == isinstance(before, Launch)
            else:
                assert isinstance(step, Fill)


def test_older_gpus_do_not_overlap() -> None:
    drafts = [op.draft(89) for op in OPS]
    variants = [variant for draft in drafts for variant in draft.variants]
    steps = [step for variant in variants for step in variant.steps if isinstance(step, Launch)]
    assert steps and not any(step.overlaps for step in steps)
    draft = drafts[0]
    (combine,) = (spec for spec in draft.kernels if spec.function == "combine")
    assert "griddepcontrol" not in lowered(KERNELS, combine, 89, "ptx")
