"""The gated delta rule: y, and both states."""

from dataclasses import dataclass

import numpy as np
import torch

from bench import gated_delta
from bench.gpu.cases.base import Arrays, Case, Cases
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.ops.spec import GatedDeltaSpec

# Heads as models have them, and sizes that no tile divides.
SPECS = (
    GatedDeltaSpec(key_heads=4, value_heads=8, key_dim=128, value_dim=128, kernel=4),  # as Qwen3.5-35B-A3B
    GatedDeltaSpec(key_heads=2, value_heads=6, key_dim=64, value_dim=64, kernel=4),
    GatedDeltaSpec(key_heads=3, value_heads=3, key_dim=24, value_dim=40, kernel=3, scale=0.7, epsilon=1e-3),
    GatedDeltaSpec(key_heads=1, value_heads=2, key_dim=256, value_dim=200, kernel=2),
)
DECODE, MIXED = (1,), (1, 40, 0, 7, 1)


@dataclass(frozen=True)
class LengthsCall:
    """New tokens of each sequence. padding: so many, the last, have row 0."""

    lengths: tuple[int, ...]
    padding: int = 0

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.lengths[:5]))
        return f"{len(self.lengths)} sequences: {shown}{', ...' if len(self.lengths) > 5 else ''}"


class GatedDeltaCases(Cases):
    """See `Cases`. Rounded keys come into play again through states and the chunks' inverses."""

    kind, step = GatedDeltaOp, 3
    sizes = (
        LengthsCall(DECODE),
        LengthsCall(3 * DECODE, 1),
        LengthsCall((2, 0, 0)),
        LengthsCall(MIXED, 1),
        LengthsCall((300,)),
        LengthsCall(64 * DECODE),
    )
    roundings = 2

    def every_op(self) -> list[GatedDeltaOp]:
        """Every dtype with every spec."""
        return [GatedDeltaOp(spec, dtype, 16 * i) for dtype in ACTIVATION_DTYPES for i, spec in enumerate(SPECS)]

    def describe(self, op: GatedDeltaOp) -> str:
        spec = op.spec
        sizes = f"{spec.key_dim}" if spec.key_dim == spec.value_dim else f"{spec.key_dim} and {spec.value_dim}"
        return f"gated delta {spec.value_heads} heads on {spec.key_heads} of {sizes} kernel {spec.kernel} {op.dtype}"

    def case(self, op: GatedDeltaOp, call: LengthsCall, seed: int) -> Case:
        inputs = gated_delta.draw_inputs(op, call.lengths, seed, call.padding)

        def deviation(found: Arrays) -> float:
            return gated_delta.deviation(op, inputs, [array.astype(np.float64) for array in found])

        given = [torch.tensor(inputs[tensor.name], dtype=getattr(torch, tensor.dtype)) for tensor in op.inputs]
        return Case(given, deviation)
