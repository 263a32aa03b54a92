"""PagedAttention's kernels, interpreted, against the numpy spec; memory that nobody wrote holds NaN."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.paged_attention import Sequences, draw_inputs
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops import paged_attention_draft
from moevlm.plugins.gpu.ops.paged_attention import CACHES, PagedAttentionOp
from moevlm.plugins.gpu.program import chosen
from moevlm.plugins.gpu.sizes import sizes_of
from moevlm.plugins.gpu.tiles import FAMILIES
from moevlm.plugins.ops.spec import AttentionSpec
from tests.plugins.gpu.interpreter import Interpreter
from tests.support.attention_variants import ATTENTIONS
from tests.support.gpu_attention import check

GQA = AttentionSpec(8, 2, 64)
FIRST_OF_FAMILY = [min(sm for sm in FAMILIES if FAMILIES[sm] == family) for family in sorted(set(FAMILIES.values()))]
STEPS: dict[str, Sequences] = {
    "decode": ((13, 1), (75, 1), (0, 1), (32, 1)),
    "prefill": ((0, 37),),
    "mixture": ((0, 5), (90, 1), (24, 20), (64, 1), (3, 2), (0, 1)),
    "empty sequences": ((2, 0), (15, 3), (0, 0), (47, 1), (6, 0)),
    "long": ((400, 20), (150, 7), (64, 1)),
    "few tokens": ((50, 2), (7, 0), (30, 0), (9, 1)),  # no more than there are sequences
}


SHARES = 4  # of keys in most tests: each is a program, and the interpreter takes its time for one


def with_shares(op: PagedAttentionOp, sm: int, most: int) -> Draft:
    """The op's draft without the variants that cut keys into more shares. Many sequences have two, short ones too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention_draft, "FEWEST_SHARES", 2)
        patch.setattr(paged_attention_draft, "LONG_SHARE", 32)
        draft = op.draft(sm)
    grids = [max(step.grid[2].at({}) for step in variant.steps) for variant in draft.variants]
    return replace(draft, variants=tuple(v for v, n in zip(draft.variants, grids, strict=True) if n <= most))


def agrees(
    interpreter: Interpreter, op: PagedAttentionOp, sequences: Sequences, sm: int = 80, seed: int = 0, shared: int = 0
) -> None:
    inputs = draw_inputs(op, sequences, seed, shared)
    check(op, inputs, interpreter.run(with_shares(op, sm, SHARES), inputs))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *product(ATTENTIONS, ("mixture",)),
        *product(("everything", "mla"), ("decode", "prefill", "empty sequences")),
        *product(("gemma4", "images without a window"), ("prefill", "long", "few tokens")),
        *product(("chunk", "window in a chunk"), ("decode", "prefill", "long")),
    ],
)
def test_every_variant_agrees_with_the_spec(triton_interpreter: Interpreter, name: str, step: str) -> None:
    variant = ATTENTIONS[name]
    op = PagedAttentionOp(
        variant.spec,
        variant.key_dim,
        variant.value_dim or variant.spec.value_dim,
        "float32",
        page_size=16,
        has_norms=variant.norms,
        has_sinks=variant.sinks,
        has_visible_end=variant.images,
    )
    agrees(triton_interpreter, op, STEPS[step])


@pytest.mark.parametrize(("step", "dtype"), [("decode", "bfloat16"), ("mixture", "float16"), ("decode", "float32")])
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_agrees_with_the_spec(triton_interpreter: Interpreter, cache: str, dtype: str, step: str) -> None:
    op = PagedAttentionOp(GQA, 64, 64, dtype, cache, page_size=32, has_norms=True)
    agrees(triton_interpreter, op, STEPS[step], sm=80 if dtype == "float16" else 90)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [
        (4, 4, 64, 64),
        (6, 2, 72, 72),
        (16, 1, 80, 96),
        (5, 1, 128, 128),
        (4, 2, 192, 128),
        (8, 1, 256, 256),  # Qwen3.5; two of them are a sliding layer of Gemma 4
        (8, 1, 512, 512),  # a full layer of Gemma 4
    ],
    ids=str,
)
@pytest.mark.parametrize("step", ["decode", "mixture"])
def test_any_heads(
    triton_interpreter: Interpreter, heads: int, kv_heads: int, key_dim: int, value_dim: int, step: str
) -> None:
    op = PagedAttentionOp(AttentionSpec(heads, kv_heads, key_dim // 2), key_dim, value_dim, "float16", page_size=16)
    agrees(triton_interpreter, op, STEPS[step])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("step", ["decode", "few tokens"])
def test_values_in_keys_of_many_heads(triton_interpreter: Interpreter, step: str, cache: str) -> None:
    spec = AttentionSpec(20, 1, 64, rotary_start=512, scale=0.05, value_in_key=True, value_dim=512)
    agrees(triton_interpreter, PagedAttentionOp(spec, 576, 512, "float16", cache, page_size=16), STEPS[step])


def test_values_in_keys_of_320(triton_interpreter: Interpreter) -> None:
    spec = AttentionSpec(32, 1, 64, rotary_start=256, value_in_key=True, value_dim=256)
    agrees(triton_interpreter, PagedAttentionOp(spec, 320, 256, "float16", page_size=16), STEPS["decode"])


@pytest.mark.parametrize("sm", FIRST_OF_FAMILY)
def test_tiles_of_every_gpu(triton_interpreter: Interpreter, sm: int) -> None:
    op = PagedAttentionOp(AttentionSpec(4, 2, 128, window=70), 128, 128, "float16", has_sinks=True)
    agrees(triton_interpreter, op, ((300, 1), (100, 90), (64, 1)), sm)


@pytest.mark.parametrize("cache", CACHES)
def test_pages_of_64_past_a_share_with_shared_pages(triton_interpreter: Interpreter, cache: str) -> None:
    op = PagedAttentionOp(AttentionSpec(2, 1, 64), 64, 64, "float16", cache, has_norms=True)
    for sequences, shared in ((((440, 1), (400, 1)), 6), (((130, 1), (128, 70)), 2)):
        inputs = draw_inputs(op, sequences, 0, shared)
        check(op, inputs, triton_interpreter.run(op.draft(90), inputs))


@pytest.mark.parametrize(
    ("step", "shares", "images"),
    [("decode", 8, False), ("few tokens", 8, True), ("mixture", 2, False), ("long", 2, True)],
)
def test_each_launch_plan_is_right_for_all_that_it_admits(
    triton_interpreter: Interpreter, step: str, shares: int, images: bool
) -> None:
    spec = AttentionSpec(4, 1, 16, window=70)
    op = PagedAttentionOp(spec, 16, 16, "float32", "", 16, has_norms=True, has_sinks=True, has_visible_end=images)
    inputs = draw_inputs(op, STEPS[step], 0)
    sizes = sizes_of(op.inputs, [inputs[t.name].shape for t in op.inputs])
    draft = with_shares(op, 90, shares)
    admitted = [variant for variant in draft.variants if variant.holds(sizes)]
    assert len(admitted) > 2
    for variant in admitted:
        check(op, inputs, triton_interpreter.run(replace(draft, variants=(variant,)), inputs))


@pytest.mark.parametrize(("cache", "step"), [("", "decode"), ("int8", "mixture")])
def test_made_up_inputs_touch_nothing_else(triton_interpreter: Interpreter, cache: str, step: str) -> None:
    spec = AttentionSpec(2, 1, 16, window=40)
    op = PagedAttentionOp(spec, 16, 16, "float16", cache, page_size=16, has_visible_end=True)
    inputs = draw_inputs(op, STEPS[step], 0)
    random = np.random.default_rng(0)
    extremes = np.array([-(1 << 31), -1, 0, 1, 17, 1 << 20, (1 << 31) - 1], np.int32)
    indices = ("query_start", "context_len", "page_table", "visible_end")
    for names in (*((name,) for name in indices), *(indices,) * 5):
        made_up = {name: random.choice(extremes, inputs[name].shape) for name in names}
        triton_interpreter.run(with_shares(op, 80, 2), inputs | made_up)


def test_shares_fill_a_gpu_and_never_are_few() -> None:
    op = PagedAttentionOp(AttentionSpec(32, 4, 128), 128, 128, has_norms=True)
    draft = op.draft(90)
    assert len(draft.kernels) <= 6

    def launches(tokens: int, sequences: int) -> dict[str, int]:
        """Kernels in order, and how many shares each takes."""
        variant = chosen(draft.variants, {"T": tokens, "N": sequences, "M": 64, "P": 4096})
        return {draft.kernels[step.kernel].function: step.grid[2].at({}) for step in variant.steps}

    assert launches(1, 1) == {"decode": 64, "merge": 1}
    assert launches(2, 2) == {"decode": 32, "merge": 1}
    assert launches(64, 64) == {"decode": 8, "merge": 1}
    assert launches(2048, 2) == {"write_pages": 1, "prefill": 1, "decode": 32, "merge": 1}
    assert launches(32, 2) == {"write_pages": 1, "prefill": 8, "decode": 8, "merge": 1}


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_step(triton_interpreter: Interpreter, data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.sampled_from((1, 2))), data.draw(st.integers(1, 16))
    key_dim, value_dim = (data.draw(st.integers(1, 40)) * 2 for _ in range(2))
    value_is_key = data.draw(st.booleans())
    value_dim = key_dim if value_is_key else value_dim
    spec = AttentionSpec(
        kv_heads * group,
        kv_heads,
        rotary_dim=2 * data.draw(st.integers(0, key_dim // 4)),
        rotary_start=data.draw(st.integers(0, key_dim // 2)),
        window=data.draw(st.sampled_from((0, 1, 9, 40))),
        chunk=data.draw(st.sampled_from((0, 0, 1, 11, 48))),
        softcap=data.draw(st.sampled_from((0.0, 2.0))),
        value_is_key=value_is_key,
        value_norm=data.draw(st.booleans()),
    )
    op = PagedAttentionOp(
        spec,
        key_dim,
        value_dim,
        "float32",
        data.draw(st.sampled_from(CACHES)),
        16,
        has_norms=data.draw(st.booleans()),
        has_sinks=data.draw(st.booleans()),
        has_visible_end=data.draw(st.booleans()),
    )
    lengths = st.one_of(st.integers(0, 2), st.integers(3, 40))
    sequences = data.draw(st.lists(st.tuples(st.integers(0, 70), lengths), min_size=1, max_size=5))
    if sum(new for _, new in sequences) == 0:
        sequences.append((0, 1))
    agrees(triton_interpreter, op, sequences, data.draw(st.sampled_from((80, 86, 90))), data.draw(st.integers(0, 99)))
