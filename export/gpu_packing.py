"""Expert weights as the GPU kernels read them, see `plugins.gpu.packing`."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from moevlm.export.quantization import Coded, Scheme, quantize
from moevlm.export.weights import Weight, cast
from moevlm.plugins.gpu import packing
from moevlm.plugins.gpu.ops import ExpertsOp

BITS = {"int8": 8, "int4": 4}


def expert_tensors(op: ExpertsOp, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The op's weight inputs by name, scales right behind their values.

    weights: gate_up [E, 2I, H] (not gated: [E, I, H]), down [E, H, I], and, with biases, gate_up_bias, down_bias.
    """
    stored: dict[str, Weight] = {}
    shapes = {tensor.name: (tensor.shape, numpy_dtype(tensor.dtype)) for tensor in op.inputs}
    for name, weight in weights.items():
        if op.weights and not name.endswith("_bias"):
            scale = f"{name}_scale"
            coded = Coded(weight, lambda rows: _encode(rows, op), shapes[name], shapes[scale])
            stored |= {name: coded.values, scale: coded.scales}
        else:
            stored[name] = cast(weight, shapes[name][1])
    return stored


def _encode(rows: np.ndarray, op: ExpertsOp) -> tuple[np.ndarray, np.ndarray]:
    if op.weights not in BITS:
        return packing.quantize(rows, op.weights, op.block, op.dtype)
    q, scales = quantize(rows, Scheme(BITS[op.weights], op.block))
    return packing.pack_codes(q, op.weights), scales


def numpy_dtype(name: str) -> np.dtype:
    """bfloat16 and the dtypes that numpy has itself."""
    return ir.DataType[{"float32": "FLOAT"}.get(name, name.upper())].numpy()
