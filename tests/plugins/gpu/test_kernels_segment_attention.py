"""The kernels of attention among patches: interpreted, against the numpy spec, and compiled for every GPU."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevlm.export.formats.base import rounded
from moevlm.plugins.gpu.compiler import KERNELS, resources
from moevlm.plugins.gpu.devices import DEVICES
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp, parts
from moevlm.plugins.ops.attention import segment_attention
from moevlm.runtime.core.errors import FieldError
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.loop_loads import waiting_loads

# Relative Frobenius norm. Interpreted bfloat16 is cut off, not rounded.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
Array = np.ndarray


def draw_inputs(op: SegmentAttentionOp, patches: int, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    angle = random.uniform(0, 6, (patches, op.head_dim // 2))
    qkv = rounded(random.standard_normal((patches, 3 * op.heads * op.head_dim)).astype(np.float32), op.dtype)
    tables = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    return {"qkv": qkv, **(tables if op.rotates else {})}


def run(interpreter: Interpreter, op: SegmentAttentionOp, inputs: dict[str, Array], start: Array, sm: int) -> Array:
    (y,) = interpreter.run(op.draft(sm), inputs | {"image_start": start.astype(np.int32)})
    return y


def agrees(
    interpreter: Interpreter, op: SegmentAttentionOp, lengths: Sequence[int], sm: int = 80, seed: int = 0
) -> None:
    start = np.concatenate([[0], np.cumsum(lengths)])
    inputs = draw_inputs(op, start[-1], seed)
    y = run(interpreter, op, inputs, start, sm)
    want = segment_attention(*np.split(inputs["qkv"], 3, 1), inputs.get("cos"), inputs.get("sin"), start, op.heads)
    assert np.linalg.norm(y - want) <= TOLERANCES[op.dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("head_dim", [4, 16, 20, 36, 64, 72, 128, 160, 256])
def test_any_head_agrees_with_the_spec(triton_interpreter: Interpreter, head_dim: int) -> None:
    agrees(triton_interpreter, SegmentAttentionOp(2, head_dim, "float32"), [33, 1, 0, 16, 7])


@pytest.mark.parametrize(
    ("sm", "dtype"), [(75, "float16"), (80, "bfloat16"), (86, "float16"), (90, "bfloat16"), (100, "float16")]
)
def test_every_tile_agrees_with_the_spec(triton_interpreter: Interpreter, sm: int, dtype: str) -> None:
    for head_dim in (72, 128, 256):
        agrees(triton_interpreter, SegmentAttentionOp(1, head_dim, dtype), [130, 20, 128], sm)


def test_many_images(triton_interpreter: Interpreter) -> None:
    agrees(triton_interpreter, SegmentAttentionOp(1, 8, "float16"), [3, 0, 0, 5] * 10)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (20, "float32")])
def test_without_tables_nothing_is_rotated(triton_interpreter: Interpreter, head_dim: int, dtype: str) -> None:
    agrees(triton_interpreter, SegmentAttentionOp(2, head_dim, dtype, rotates=False), [17, 1, 33])


def test_an_image_gets_what_it_gets_alone(triton_interpreter: Interpreter) -> None:
    op = SegmentAttentionOp(2, 24, "float16")
    inputs = draw_inputs(op, 90, seed=1)
    y = run(triton_interpreter, op, inputs, np.array([0, 20, 90]), 80)
    alone = {name: value[20:] for name, value in inputs.items()}
    np.testing.assert_array_equal(y[20:], run(triton_interpreter, op, alone, np.array([0, 70]), 80))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any), st.integers(0, 1 << 30))
def test_any_images(triton_interpreter: Interpreter, lengths: list[int], seed: int) -> None:
    agrees(triton_interpreter, SegmentAttentionOp(1, 12, "float32"), lengths, seed=seed)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(-9, 40), min_size=2, max_size=7))
def test_whatever_the_images_are_nothing_is_touched_out_of_bounds(
    triton_interpreter: Interpreter, start: list[int]
) -> None:
    """TensorRT's builder runs plugins on made-up inputs. The interpreter raises OutOfBounds."""
    op = SegmentAttentionOp(1, 8, "float16")
    run(triton_interpreter, op, draw_inputs(op, 21, seed=2), np.array(start), 86)


def test_kernels_fit_every_gpu_and_spill_nothing() -> None:
    for op in (SegmentAttentionOp(16, 72, "float16"), SegmentAttentionOp(16, 64, "float16", rotates=False)):
        found = resources(op, DEVICES)
        assert [(each.entry, each.sm) for each in found] == [
            (entry, sm) for sm in DEVICES for entry in ("rotate_patches", "segment_attention")
        ]
        assert not any(each.spilled for each in found)


@pytest.mark.parametrize(("head_dim", "sms"), [(128, (80, 90, 100)), (256, (86, 90))])
def test_larger_heads_spill_nothing(head_dim: int, sms: Sequence[int]) -> None:
    assert not any(each.spilled for each in resources(SegmentAttentionOp(16, head_dim), sms))


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_keys_and_values_are_copied_ahead(sm: int) -> None:
    """Also of heads of 40 bytes, whose rows are aligned to 8."""
    for head_dim in (72, 20):
        _, kernel = SegmentAttentionOp(16, head_dim).draft(sm).kernels
        assert waiting_loads(KERNELS, kernel, sm) == []


@pytest.mark.parametrize(("head_dim", "expected"), [(4, (16, 0)), (40, (32, 16)), (72, (64, 16)), (100, (128, 0))])
def test_a_head_is_padded_to_little_more_than_it_is(head_dim: int, expected: tuple[int, int]) -> None:
    assert parts(head_dim) == expected


def test_parts_have_room_for_every_head() -> None:
    for head_dim in range(4, 257, 2):
        padded = sum(parts(head_dim))
        assert head_dim <= padded <= max(1.5 * head_dim, head_dim + 14)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 0, "head_dim": 8}, "heads = 0"),
        ({"heads": 1, "head_dim": 7}, r"head_dim = 7 \(allowed: an even number from 4 to 256\)"),
        ({"heads": 1, "head_dim": 258}, "head_dim = 258"),
        ({"heads": 1, "head_dim": 8, "dtype": "int8"}, 'dtype = "int8"'),
    ],
    ids=["heads", "odd", "wide", "dtype"],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        SegmentAttentionOp(**fields)


def test_bfloat16_needs_sm80() -> None:
    with pytest.raises(ValueError, match=r"dtype = bfloat16 on sm75 \(allowed: float16\)"):
        SegmentAttentionOp(1, 8).draft(75)
