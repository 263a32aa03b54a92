"""A draft whose kernels run in watched memory, in Triton's interpreter."""

from __future__ import annotations

import numpy as np

from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.program import Argument, Launch, chosen
from moevlm.plugins.gpu.sizes import SYMBOLS, sizes_of


def run(draft: Draft, inputs: dict[str, np.ndarray], unwritten: dict[str, np.ndarray]) -> list[np.ndarray]:
    """y, float32, and the inputs that the draft writes, after it. To be called where TRITON_INTERPRET=1 was set.

    unwritten: for each byte of an input whether nobody has written it before. Raises MemoryFault, inside of an
    InterpreterError, for a read of what nobody wrote, and where programs of one launch meet.
    """
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
    names = [tensor.name for tensor in draft.inputs if tensor.written]
    after = [memory.view(given[name], inputs[name].nbytes).view(inputs[name].dtype) for name in names]
    return [
        memory.read(addresses["output"][0], y.at(sizes), np.dtype(np.float32)).copy(),
        *(data.reshape(inputs[name].shape).copy() for name, data in zip(names, after, strict=True)),
    ]
