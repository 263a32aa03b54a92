"""PagedAttention's kernels in watched memory: no read of what nobody wrote, and no programs that meet in one launch."""

from __future__ import annotations

import numpy as np
import pytest

from bench.paged_attention import draw_inputs, numbers
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.ops.spec import AttentionSpec
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.test_kernels_paged_attention import STEPS, with_shares
from tests.plugins.gpu.watched_draft import run
from tests.support.gpu_attention import check


def unwritten_bytes(op: PagedAttentionOp, cache: np.ndarray) -> np.ndarray:
    """Of a cache that `draw_inputs` made: those of rows that are not numbers."""
    rows = np.isnan(numbers(op, cache)).any(-1)  # [pages, heads, page]
    if not op.cache:
        return np.repeat(rows, cache.shape[-1] * cache.itemsize)
    codes, scales = (np.repeat(rows, width, axis=-1) for width in (cache.shape[-1] - 4, 4))
    return np.concatenate([codes, scales], axis=-1).reshape(-1)


@pytest.mark.parametrize("step", ["decode", "mixture", "few tokens", "long"])
@pytest.mark.parametrize("cache", ["", "int8"])
def test_kernels_read_what_was_written_and_do_not_meet(triton_interpreter: Interpreter, cache: str, step: str) -> None:
    op = PagedAttentionOp(AttentionSpec(4, 2, 16, window=60), 16, 16, "float32", cache, 16, has_norms=True)
    inputs = draw_inputs(op, STEPS[step], 0)
    unwritten = {t.name: unwritten_bytes(op, inputs[t.name]) for t in op.inputs if t.written}
    draft = with_shares(op, 90, 2)
    check(op, inputs, triton_interpreter.call(run, draft, inputs, unwritten))


def test_a_key_that_nobody_wrote_is_noticed(triton_interpreter: Interpreter) -> None:
    op = PagedAttentionOp(AttentionSpec(1, 1, 0), 16, 16, "float32", "", 16)
    inputs = draw_inputs(op, ((20, 1),), 0)
    unwritten = {t.name: unwritten_bytes(op, inputs[t.name]) for t in op.inputs if t.written}
    inputs["context_len"] = np.array([25], np.int32)
    with pytest.raises(Exception, match="are read and were never written"):
        triton_interpreter.call(run, with_shares(op, 90, 2), inputs, unwritten)
