"""PagedAttention's kernels in watched memory: no read of what nobody wrote, and no programs that meet in one launch."""

from __future__ import annotations

import numpy as np
import pytest

from bench.paged_attention import draw_inputs, numbers
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.gpu.program import Argument, Launch, chosen
from moevlm.plugins.gpu.sizes import SYMBOLS, sizes_of
from moevlm.plugins.ops.spec import AttentionSpec
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.test_kernels_paged_attention import STEPS, with_shares
from tests.support.gpu_attention import check


def run(draft: Draft, inputs: dict[str, np.ndarray], unwritten: dict[str, np.ndarray]) -> list[np.ndarray]:
    """y, float32, and the caches. unwritten: for each byte of a cache whether nobody has written it before."""
    from tests.support.simulator.memory import Memory
    from tests.support.simulator.sanitizer import run_kernel, watched

    memory = Memory()
    sizes = sizes_of(draft.inputs, [inputs[tensor.name].shape for tensor in draft.inputs])
    variant = chosen(draft.variants, sizes)
    given = {tensor.name: memory.add(inputs[tensor.name]) for tensor in draft.inputs}
    for name, some in unwritten.items():
        memory.written(given[name], len(some))[some] = False
    (y,) = draft.outputs
    addresses = {
        "input": list(given.values()),
        "output": [memory.allocate(4 * int(np.prod(y.at(sizes))))[0]],
        "workspace": [memory.allocate(size.at(sizes))[0] for size in variant.buffers],
    }

    def value(argument: Argument) -> int:
        if argument.kind in addresses:
            return addresses[argument.kind][argument.index]
        return sizes[SYMBOLS[argument.index]] if argument.kind == "symbol" else argument.index

    with watched(memory):
        for step in variant.steps:
            assert isinstance(step, Launch)
            grid = tuple(count.at(sizes) for count in step.grid)
            run_kernel(memory, draft.kernels[step.kernel], grid, [value(argument) for argument in step.arguments])
    caches = [name for name in given if name in unwritten]
    after = [memory.view(given[name], inputs[name].nbytes).view(inputs[name].dtype) for name in caches]
    return [
        memory.read(addresses["output"][0], y.at(sizes), np.dtype(np.float32)).copy(),
        *(data.reshape(inputs[name].shape).copy() for name, data in zip(caches, after, strict=True)),
    ]


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
