"""How the GPU kernels of plugins/gpu read quantized weights: codes <-> int8 [n, stored width], and their scales.

K is cut into groups, the last padded with zeros. A group of B values is
- int8: B bytes, the signed values;
- int4: B / 4 units of 16 bits, little-endian: unit j has the values j, j + B / 4, j + B / 2 and j + 3 B / 4, the first
  in its lowest 4 bits, each plus 8;
- fp4: the same with e2m1 codes;
- fp8: B bytes, e4m3 codes.

Scales stand by group, those of all rows side by side, so that a tile of rows reads them in few and whole pieces. Zeros
of int4 stand likewise, eight rows to a word of 32 bits, the first in its lowest 4 bits.
"""

import numpy as np

from moevlm.export.formats.base import WeightFormat
from moevlm.plugins.gpu.ops.projection import ZEROS_PER_WORD, scale_rows

Array = np.ndarray
LAYOUT = 3  # raised with every change to what is described here


def pack(codes: Array, name: str) -> Array:
    """codes: [n, groups, group_size] uint8, as the format called `name` encodes them."""
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


def pack_zeros(zeros: Array) -> Array:
    """zeros: [.., N, groups] uint8 -> [.., groups, zero_words(N)] int32."""
    nibbles = pack_scales(zeros).astype(np.uint32)
    words = nibbles.reshape(*nibbles.shape[:-1], -1, ZEROS_PER_WORD)
    return np.bitwise_or.reduce(words << np.arange(0, 32, 4, dtype=np.uint32), axis=-1).view(np.int32)


def unpack(stored: Array, scales: Array, stored_as: WeightFormat, width: int, zeros: Array | None = None) -> Array:
    """What stored [.., N, stored width] stands for: [.., N, width] float32.

    scales, zeros: as `pack_scales` and `pack_zeros` leave them.
    """
    if zeros is not None:
        nibbles = zeros.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        by_group = nibbles.reshape(*zeros.shape[:-1], -1)[..., : stored.shape[-2]]
        zeros = np.ascontiguousarray(by_group.swapaxes(-1, -2)).astype(np.uint8)
    scales = np.ascontiguousarray(scales[..., : stored.shape[-2]].swapaxes(-1, -2))
    size = stored_as.group_size
    if stored_as.name in ("int4", "fp4"):
        units = np.ascontiguousarray(stored).view("<u2").reshape(*scales.shape, size // 4)
        codes = np.concatenate([units >> bits & 15 for bits in (0, 4, 8, 12)], -1).astype(np.uint8)
    else:
        codes = np.ascontiguousarray(stored).view(np.uint8).reshape(*scales.shape, size)
        if stored_as.name == "int8":
            codes = codes ^ np.uint8(128)
    return stored_as.decode(codes, scales, zeros)[..., :width]
