"""Expert weights as the GPU kernels read them, see `moevlm.export.formats.gpu_packing`."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from moevlm.export.formats.encoded import Encoded
from moevlm.export.formats.gpu_packing import pack, pack_scales
from moevlm.export.formats.registry import weight_format
from moevlm.export.graph.weights import Weight, cast, uncast
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.runtime.core.dtypes import DTYPES


def expert_tensors(op: ExpertsOp, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The op's weight inputs by name, scales right behind their values.

    Quantized experts are rounded once: from the checkpoint's values, or not at all where it has the same codes.
    weights: gate_up [E, 2I, H] (not gated: [E, I, H]), down [E, H, I], and, with biases, gate_up_bias, down_bias.
    """
    stored: dict[str, Weight] = {}
    shapes = {tensor.name: (tensor.at({}), DTYPES[tensor.dtype].numpy) for tensor in op.inputs[3:]}
    form = weight_format(op.weights, op.group_size, op.dtype) if op.weights else None
    for name, weight in weights.items():
        if form is not None and not name.endswith("_bias"):
            scale = f"{name}_scale"
            packed = partial(_packed, name=form.name, rows=weight.shape[1])
            encoded = Encoded(uncast(weight), form, packed, shapes[name], shapes[scale])
            stored |= {name: encoded.values, scale: encoded.scales}
        else:
            stored[name] = cast(weight, shapes[name][1])
    return stored


def _packed(codes: np.ndarray, scales: np.ndarray, name: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """codes: [experts * rows, groups, group_size], of whole experts, in the format of that name."""
    return pack(codes, name), pack_scales(scales.reshape(-1, rows, scales.shape[1]))
