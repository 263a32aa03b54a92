"""Drafts: what they launch, and that grids and buffers are large enough for any routing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevlm.plugins.gpu import kernels, tiles
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.projection import FORMATS
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.program import Fill, Image, Launch, Variant
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

QWEN3 = ExpertsOp(ExpertsSpec(), 128, 8, 2048, 768)
SMS = sorted(tiles.FAMILIES)


def launches(made: Draft, variant: Variant) -> list[str]:
    return [made.kernels[step.kernel].function for step in variant.steps if isinstance(step, Launch)]


def variant(made: Draft, tokens: int) -> Variant:
    return Image(made.sm, (), made.variants).variant({"T": tokens})


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("sm", SMS)
def test_arguments_are_those_of_the_kernels(sm: int, weights: str) -> None:
    op = dataclasses.replace(QWEN3, weights=weights, dtype="float16")
    for made in (op.draft(sm), RouterOp(RouterSpec(8), 128).draft(sm)):
        for spec in made.kernels:
            names = getattr(kernels, spec.function).arg_names
            assert set(names[len(spec.types) :]) == {name for name, _ in spec.constants}
        for step in (step for v in made.variants for step in v.steps if isinstance(step, Launch)):
            assert len(step.arguments) == len(made.kernels[step.kernel].types)


def test_one_token_takes_two_launches_and_a_few_take_three() -> None:
    made = QWEN3.draft(90)
    assert launches(made, variant(made, 1)) == ["few_gate_up", "single_down"]
    assert launches(made, variant(made, 2)) == launches(made, variant(made, 8))
    assert launches(made, variant(made, 8)) == ["few_gate_up", "few_down", "combine"]
    grouped = ["grouped_gate_up", "grouped_down", "combine"]
    assert launches(made, variant(made, 9)) == launches(made, variant(made, 64)) == ["sort_rows", *grouped]
    assert launches(made, variant(made, 65)) == ["count_rows", "start_rows", "place_rows", *grouped]


@pytest.mark.parametrize("sm", SMS)
def test_kernels_are_few(sm: int) -> None:
    assert len(dataclasses.replace(QWEN3, dtype="float16").draft(sm).kernels) <= 15


@pytest.mark.parametrize("bits", ["4", "32"])
def test_a_quarter_of_a_step_is_no_less_than_a_product_takes(bits: str) -> None:
    for entry in (family[bits] for family in tiles.table().values()):
        for chosen in (entry["single"], entry["few"], *entry["grouped"]):
            assert all(tiles.Tile(*chosen[name]).BK >= 4 * 16 for name in ("gate_up", "down"))


@pytest.mark.parametrize("max_tokens", [1, 5, 8, 9, 4096])
def test_variants_rise_up_to_the_most_tokens(max_tokens: int) -> None:
    for op in (QWEN3, RouterOp(RouterSpec(8), 128)):
        limits = [v.max_tokens for v in op.draft(90, max_tokens).variants]
        assert limits == sorted(set(limits))
        assert limits[-1] == max_tokens


def test_bfloat16_needs_sm80() -> None:
    with pytest.raises(ValueError, match=r"dtype = bfloat16 on sm75 \(allowed: float16\)"):
        QWEN3.draft(75)
    assert dataclasses.replace(QWEN3, dtype="float16").draft(75).kernels


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sm70 \(allowed: sm75, sm80"):
        QWEN3.draft(70)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_grids_and_buffers_have_room_for_any_routing(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, min(8, experts)))
    tokens = data.draw(st.integers(9, 3000))
    op = ExpertsOp(ExpertsSpec(), experts, top_k, data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300)))
    made = op.draft(90)
    chosen = variant(made, tokens)
    # Rows per expert, from even to all on a few; no more than one row of a token to an expert.
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    favour = rng.random(experts) ** data.draw(st.integers(0, 20))
    index = np.argsort(-favour * rng.random((tokens, experts)), 1)[:, :top_k]
    counts = np.bincount(index.ravel(), minlength=experts)
    grouped = [s for s in chosen.steps if isinstance(s, Launch) and "grouped" in made.kernels[s.kernel].function]
    assert len(grouped) == 2
    for step, width in zip(grouped, (op.inner, op.hidden), strict=True):
        spec = made.kernels[step.kernel]
        constants = dict(spec.constants)
        at = step.arguments[getattr(kernels, spec.function).arg_names.index("blocks")].index
        blocks = int(np.sum(-(-counts // constants["TILE"].BM)))
        assert step.grid[0].at({"T": tokens}) >= blocks * -(-width // constants["TILE"].BN)
        assert chosen.buffers[at].at({"T": tokens}) >= blocks * 8
    for fill in (step for step in chosen.steps if isinstance(step, Fill)):
        assert fill.words.at({"T": tokens}) * 4 == chosen.buffers[fill.buffer].at({"T": tokens})


@pytest.mark.parametrize("sm", SMS)
def test_no_grid_is_larger_than_a_gpu_takes(sm: int) -> None:
    op = ExpertsOp(ExpertsSpec(), 512, 16, 8192, 4096, dtype="float16")
    for made in (op.draft(sm), RouterOp(RouterSpec(16), 512).draft(sm)):
        last = made.variants[-1]
        for each in made.variants:
            for step in (step for step in each.steps if isinstance(step, Launch)):
                x, y, z = (count.at({"T": each.max_tokens}) for count in step.grid)
                assert 0 < x < 1 << 31
                assert 0 < y < 1 << 16
                assert z == 1
        assert last.max_tokens == 1 << 20
