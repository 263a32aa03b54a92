"""Expert weights as the GPU kernels read them, see `plugins.gpu.packing`."""

from collections.abc import Mapping

import numpy as np

from moevlm.export.formats.quantization import Coded, Scheme, quantize
from moevlm.export.graph.weights import PerRow, Weight, cast
from moevlm.plugins.gpu import packing
from moevlm.plugins.gpu.ops import ExpertsOp
from moevlm.runtime.core.dtypes import DTYPES

BITS = {"int8": 8, "int4": 4}


def expert_tensors(op: ExpertsOp, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The op's weight inputs by name, scales right behind their values.

    weights: gate_up [E, 2I, H] (not gated: [E, I, H]), down [E, H, I], and, with biases, gate_up_bias, down_bias.
    """
    stored: dict[str, Weight] = {}
    shapes = {tensor.name: (tensor.shape, DTYPES[tensor.dtype].numpy) for tensor in op.inputs}
    for name, weight in weights.items():
        if op.weights and not name.endswith("_bias"):
            scale = f"{name}_scale"
            coded = Coded(weight, lambda r: _encode(r, op.weights, op.block, op.dtype), shapes[name], shapes[scale])
            stored |= {name: coded.values, scale: coded.scales}
        else:
            stored[name] = cast(weight, shapes[name][1])
    return stored


def as_stored(weight: Weight, weights: str, block: int, dtype: str) -> Weight:
    """What the kernels compute with: weight [E, N, K] through its stored form and back, float32.

    weights, block, dtype: as in ExpertsOp.
    """

    def through(array: np.ndarray) -> np.ndarray:
        rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
        stored, scales = _encode(rows, weights, block, dtype)
        values = packing.unpack(stored, packing.rounded(scales, dtype), weights, block, rows.shape[1])
        return values.reshape(array.shape)

    return PerRow(weight, weight.shape, np.dtype(np.float32), through)


def _encode(rows: np.ndarray, weights: str, block: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    if weights not in BITS:
        return packing.quantize(rows, weights, block, dtype)
    q, scales = quantize(rows, Scheme(BITS[weights], block))
    return packing.pack_codes(q, weights), scales
