"""The kernel of queries that all images share: interpreted, against the numpy spec, and compiled for every GPU."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevlm.export.formats.base import rounded
from moevlm.plugins.gpu.compiler import KERNELS, resources
from moevlm.plugins.gpu.devices import DEVICES
from moevlm.plugins.gpu.ops.cross_attention import CrossAttentionOp
from moevlm.plugins.ops.attention import cross_attention
from moevlm.runtime.core.errors import FieldError
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.loop_loads import waiting_loads
from tests.plugins.gpu.test_kernels_segment_attention import TOLERANCES

Array = np.ndarray


def draw_inputs(op: CrossAttentionOp, patches: int, seed: int) -> dict[str, Array]:
    random, width = np.random.default_rng(seed), op.heads * op.head_dim
    shapes = {"q": (op.queries, width), "kv": (patches, 2 * width)}
    return {name: rounded(random.standard_normal(shape, np.float32), op.dtype) for name, shape in shapes.items()}


def run(interpreter: Interpreter, op: CrossAttentionOp, inputs: dict[str, Array], start: Array, sm: int = 80) -> Array:
    (y,) = interpreter.run(op.draft(sm), inputs | {"image_start": start.astype(np.int32)})
    return y


def agrees(interpreter: Interpreter, op: CrossAttentionOp, lengths: Sequence[int], sm: int = 80, seed: int = 0) -> None:
    start = np.cumsum([0, *lengths])
    inputs = draw_inputs(op, start[-1], seed)
    want = cross_attention(inputs["q"], *np.split(inputs["kv"], 2, 1), start, op.heads)
    y = run(interpreter, op, inputs, start, sm)
    assert y.shape == want.shape
    assert np.linalg.norm(y - want) <= TOLERANCES[op.dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("head_dim", [4, 20, 64, 72, 256])
def test_any_head_agrees_with_the_spec(triton_interpreter: Interpreter, head_dim: int) -> None:
    agrees(triton_interpreter, CrossAttentionOp(5, 2, head_dim, "float32"), [33, 1, 16])


@pytest.mark.parametrize(
    ("sm", "dtype"), [(75, "float16"), (80, "bfloat16"), (86, "float16"), (90, "bfloat16"), (100, "float16")]
)
def test_every_tile_agrees_with_the_spec(triton_interpreter: Interpreter, sm: int, dtype: str) -> None:
    """More queries than a tile has rows, and images of fewer and of more patches than it has columns."""
    for head_dim in (72, 128):
        agrees(triton_interpreter, CrossAttentionOp(130, 1, head_dim, dtype), [20, 130], sm)


def test_an_image_gets_what_it_gets_alone(triton_interpreter: Interpreter) -> None:
    op = CrossAttentionOp(9, 2, 24, "float16")
    inputs = draw_inputs(op, 90, seed=1)
    y = run(triton_interpreter, op, inputs, np.array([0, 20, 90]))
    alone = inputs | {"kv": inputs["kv"][20:]}
    np.testing.assert_array_equal(y[1:], run(triton_interpreter, op, alone, np.array([0, 70])))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 70), st.integers(0, 1 << 30))
def test_any_images(triton_interpreter: Interpreter, lengths: list[int], queries: int, seed: int) -> None:
    agrees(triton_interpreter, CrossAttentionOp(queries, 1, 12, "float32"), lengths, seed=seed)


def test_no_image_at_all_has_no_rows(triton_interpreter: Interpreter) -> None:
    op = CrossAttentionOp(3, 1, 8, "float16")
    assert run(triton_interpreter, op, draw_inputs(op, 5, seed=3), np.array([0])).shape == (0, 3, 8)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(-9, 40), min_size=2, max_size=7))
def test_whatever_the_images_are_nothing_is_touched_out_of_bounds(
    triton_interpreter: Interpreter, start: list[int]
) -> None:
    """TensorRT's builder runs plugins on made-up inputs. The interpreter raises OutOfBounds."""
    op = CrossAttentionOp(5, 1, 8, "float16")
    run(triton_interpreter, op, draw_inputs(op, 21, seed=2), np.array(start), 86)


def test_kernels_fit_every_gpu_and_spill_nothing() -> None:
    """Of Aria's resampler."""
    found = resources(CrossAttentionOp(256, 16, 72, "float16"), DEVICES)
    assert [(each.entry, each.sm) for each in found] == [("cross_attention", sm) for sm in DEVICES]
    assert not any(each.spilled for each in found)


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_keys_and_values_are_copied_ahead(sm: int) -> None:
    (kernel,) = CrossAttentionOp(256, 16, 72).draft(sm).kernels
    assert waiting_loads(KERNELS, kernel, sm) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": 0, "heads": 1, "head_dim": 8}, "queries = 0"),
        ({"queries": 1 << 16, "heads": 128, "head_dim": 256}, r"queries = 65536 \(allowed: 1 to 65535, "),
        ({"queries": 1, "heads": 0, "head_dim": 8}, "heads = 0"),
        ({"queries": 1, "heads": 1, "head_dim": 7}, r"head_dim = 7 \(allowed: an even number from 4 to 256\)"),
        ({"queries": 1, "heads": 1, "head_dim": 8, "dtype": "int8"}, 'dtype = "int8"'),
    ],
    ids=["queries", "32 bits", "heads", "odd", "dtype"],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        CrossAttentionOp(**fields)


def test_bfloat16_needs_sm80() -> None:
    with pytest.raises(ValueError, match=r"dtype = bfloat16 on sm75 \(allowed: float16\)"):
        CrossAttentionOp(4, 1, 8).draft(75)
