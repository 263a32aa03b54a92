"""Expert weights as the GPU kernels read them, see `moevlm.export.formats.gpu_packing`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from moevlm.export.backends.tensorrt.expert_formats import expert_form, held_form
from moevlm.export.formats.encoded import Encoded
from moevlm.export.formats.gpu_packing import pack, pack_scale_words, pack_scales, pack_zeros
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.registry import weight_format
from moevlm.export.formats.stored import keeping, narrowed
from moevlm.export.graph.codes import Codes
from moevlm.export.graph.weights import Weight, uncast
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.engine_metadata import MIXED


def expert_tensors(op: ExpertsOp, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The op's weight inputs by name.

    Quantized experts are rounded once: from the checkpoint's values, or not at all where it has the same codes.
    Scales, and zeros behind them where the op has some, lie behind their values.
    weights: gate_up [E, 2I, H] (not gated: [E, I, H]), down [E, H, I], and, with biases, gate_up_bias, down_bias.
    """
    stored: dict[str, Weight] = {}
    shapes = {tensor.name: (tensor.at({}), DTYPES[tensor.dtype].numpy) for tensor in op.inputs[3:]}
    for name, weight in weights.items():
        if op.weights and not name.endswith("_bias"):
            form = weight_format(*op.form)
            if op.zeros and isinstance(form, IntFormat):
                form = replace(form, zeros=True)
            names = [f"{name}{part}" for part in ("_scale", "_zero", "_row_scale") if f"{name}{part}" in shapes]
            packed = partial(_packed, name=form.name, rows=weight.shape[1])
            encoded = Encoded(uncast(weight), form, packed, shapes[name], *(shapes[other] for other in names))
            stored |= {name: encoded.values} | dict(zip(names, encoded.others, strict=True))
        else:
            stored[name] = narrowed(weight, shapes[name][1])
    return stored


def storing(op: ExpertsOp, form: str, group_size: int, *weights: Weight) -> ExpertsOp:
    """The op, whose weights are not quantized, with gate_up and down stored in a format, their own codes exactly.

    form, group_size: of the options, as in `ExpertsOp`, or MIXED. See `formats.stored.keeping`.
    """
    if form == MIXED:
        form, group_size = held_form(*weights) or ("", group_size)
    if not form:
        return op
    kept = keeping(expert_form(form, group_size, op.dtype), *map(uncast, weights))
    scales = "" if kept.scales == op.dtype else kept.scales
    zeros = isinstance(kept, IntFormat) and kept.zeros
    return replace(op, weights=form, group_size=group_size, scales=scales, zeros=zeros)


def _packed(found: Codes, name: str, rows: int) -> tuple[np.ndarray, ...]:
    """found: of [experts * rows, groups, group_size], whole experts, in the format of that name."""
    groups = found.scales.shape[1]
    if found.levels is not None:
        words = pack_scale_words(found.levels.groups.reshape(-1, rows, groups))
        return pack(found.codes, name), words, found.levels.rows
    packed = pack(found.codes, name), pack_scales(found.scales.reshape(-1, rows, groups))
    return packed if found.zeros is None else (*packed, pack_zeros(found.zeros.reshape(-1, rows, groups)))
