"""Weights as an experts op stores them, drawn or rounded, and what they stand for."""

from collections.abc import Mapping

import numpy as np

from moevlm.export.formats.gpu_packing import pack, pack_scale_words, pack_scales, pack_zeros, unpack
from moevlm.export.formats.registry import weight_format
from moevlm.plugins.gpu.ops.experts import ExpertsOp


def stored_weight(op: ExpertsOp, name: str, weight: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The inputs that a weight [E, N, K] float32 becomes, by name, if the op's are quantized. Zeros are drawn."""
    outer, rows = weight.shape[:2], weight.reshape(-1, weight.shape[-1])
    form = weight_format(*op.form)
    codes, scales = form.encode(rows)
    made = {name: pack(codes, op.weights).reshape(*outer, -1)}
    if op.row_scales:
        of_groups, of_rows = form.levels(rows)
        words = pack_scale_words(of_groups.reshape(*outer, -1))
        return made | {f"{name}_scale": words, f"{name}_row_scale": of_rows.reshape(outer)}
    made[f"{name}_scale"] = pack_scales(scales.reshape(*outer, -1))
    if op.zeros:
        zeros = np.random.default_rng(seed).integers(0, 16, (*outer, scales.shape[1]), np.uint8)
        made[f"{name}_zero"] = pack_zeros(zeros)
    return made


def meant_weight(op: ExpertsOp, name: str, stored: Mapping[str, np.ndarray], width: int) -> np.ndarray:
    """What these inputs stand for: [E, N, width] float32."""
    others = (stored.get(f"{name}{part}") for part in ("_zero", "_row_scale"))
    return unpack(stored[name], stored[f"{name}_scale"], weight_format(*op.form), width, *others)
