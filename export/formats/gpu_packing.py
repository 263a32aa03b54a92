"""How the GPU kernels of plugins/gpu read quantized weights: codes <-> int8 [n, stored width], and their scales.

K is cut into groups, the last padded with zeros. A group of B values is
- int8: B bytes, the signed values;
- int4: B / 4 units of 16 bits, little-endian: unit j has the values j, j + B / 4, j + B / 2 and j + 3 B / 4, the first
  in its lowest 4 bits, each plus 8;
- fp4: the same with e2m1 codes;
- fp8: B bytes, e4m3 codes.

fp4 in groups of 16 (NVFP4) is stored as in groups of 64: a unit has a value of each of four groups, whose scales, e4m3
codes, are a word of 32 bits, the first in its lowest 8 bits. A float32 of each row belongs to them.

Scales stand by group, those of all rows side by side, so that a tile of rows reads them in few and whole pieces. Zeros
of int4 stand likewise, eight rows to a word of 32 bits, the first in its lowest 4 bits.
"""

import numpy as np

from moevlm.export.formats import float8
from moevlm.export.formats.base import WeightFormat
from moevlm.plugins.gpu.ops.experts import NVFP4_GROUP
from moevlm.plugins.gpu.ops.projection import SCALES_PER_WORD, ZEROS_PER_WORD, scale_rows

Array = np.ndarray
LAYOUT = 3  # raised with every change to what is described here


def pack(codes: Array, name: str) -> Array:
    """codes: [n, groups, group_size] uint8, as the format called `name` encodes them."""
    if name == "fp4" and codes.shape[-1] == NVFP4_GROUP:
        codes = _by_words(codes, 1).reshape(len(codes), -1, SCALES_PER_WORD * NVFP4_GROUP)
    if name in ("int4", "fp4"):
        quarters = codes.reshape(*codes.shape[:-1], 4, -1).astype("<u2")
        units = quarters[..., 0, :] | quarters[..., 1, :] << 4 | quarters[..., 2, :] << 8 | quarters[..., 3, :] << 12
        return units.reshape(len(codes), -1).view(np.int8)
    stored = codes ^ np.uint8(128) if name == "int8" else codes
    return stored.view(np.int8).reshape(len(codes), -1)


def pack_scales(scales: Array) -> Array:
    """scales: [.., N, groups] -> [.., groups, scale_rows(N)], zeros behind those of the rows."""
    rows = scales.shape[-2]
    padding = [(0, 0)] * (scales.ndim - 1) + [(0, scale_rows(rows) - rows)]
    return np.pad(np.ascontiguousarray(scales.swapaxes(-1, -2)), padding)


def pack_scale_words(codes: Array) -> Array:
    """codes: of e4m3 scales, [.., N, groups] uint8 -> [.., words of groups, scale_rows(N)] int32."""
    words = np.ascontiguousarray(_by_words(codes, codes.ndim - 1), np.uint8).view("<i4")
    return pack_scales(words)


def _by_words(array: Array, axis: int) -> Array:
    """With zeros behind the groups that stand along an axis, so that their scales fill whole words."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % SCALES_PER_WORD)
    return np.pad(array, padding)


def pack_zeros(zeros: Array) -> Array:
    """zeros: [.., N, groups] uint8 -> [.., groups, zero_words(N)] int32."""
    nibbles = pack_scales(zeros).astype(np.uint32)
    words = nibbles.reshape(*nibbles.shape[:-1], -1, ZEROS_PER_WORD)
    return np.bitwise_or.reduce(words << np.arange(0, 32, 4, dtype=np.uint32), axis=-1).view(np.int32)


def unpack(
    stored: Array,
    scales: Array,
    stored_as: WeightFormat,
    width: int,
    zeros: Array | None = None,
    row_scales: Array | None = None,
) -> Array:
    """What stored [.., N, stored width] stands for: [.., N, width] float32.

    scales, zeros: as `pack_scales` and `pack_zeros` leave them. row_scales: [.., N], of scales as `pack_scale_words`
    leaves them.
    """
    if zeros is not None:
        nibbles = zeros.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        by_group = nibbles.reshape(*zeros.shape[:-1], -1)[..., : stored.shape[-2]]
        zeros = np.ascontiguousarray(by_group.swapaxes(-1, -2)).astype(np.uint8)
    scales = np.ascontiguousarray(scales[..., : stored.shape[-2]].swapaxes(-1, -2))
    size = stored_as.group_size
    if row_scales is not None:
        numbers = float8.numbers(scales.view(np.uint8))
        units = np.ascontiguousarray(stored).view("<u2").reshape(*scales.shape, size)
        codes = np.stack([units >> bits & 15 for bits in (0, 4, 8, 12)], -2).reshape(*numbers.shape, size)
        return stored_as.decode(codes, numbers * row_scales[..., None])[..., :width]
    if stored_as.name in ("int4", "fp4"):
        units = np.ascontiguousarray(stored).view("<u2").reshape(*scales.shape, size // 4)
        codes = np.concatenate([units >> bits & 15 for bits in (0, 4, 8, 12)], -1).astype(np.uint8)
    else:
        codes = np.ascontiguousarray(stored).view(np.uint8).reshape(*scales.shape, size)
        if stored_as.name == "int8":
            codes = codes ^ np.uint8(128)
    return stored_as.decode(codes, scales, zeros)[..., :width]
