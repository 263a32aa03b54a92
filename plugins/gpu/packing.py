"""How the kernels want an expert's weights stored: rows [n, K] of numbers <-> int8 [n, stored width] and scales.

K is cut into blocks, the last padded with zeros; each block has one scale. A block of B values is
- int8: B bytes, the values;
- int4: B / 4 units of 16 bits, little-endian: unit j has the values j, j + B / 4, j + B / 2 and j + 3 B / 4, the first
  in its lowest 4 bits, each plus 8;
- fp8: B bytes, e4m3 codes. The two that are not numbers are never written; what they are read as depends on the GPU.
"""

import numpy as np

Array = np.ndarray
ZERO = {"int8": 128, "int4": 8}
FP8_MAX = 448.0


def _fp8_values() -> Array:
    code = np.arange(127)
    exponent, fraction = code >> 3, code & 7
    return np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))


FP8 = _fp8_values()  # of the codes 0 to 126, rising; +128 for the sign


def rounded(values: Array, dtype: str) -> Array:
    """values as `dtype` holds them, to nearest even: float32."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def pack_codes(q: Array, weights: str) -> Array:
    """q [n, blocks, B] uint8 -> int8 [n, stored width]; a value is q - 128 for "int8", q - 8 for "int4"."""
    if weights == "int4":
        quarters = q.reshape(*q.shape[:-1], 4, -1).astype("<u2")
        units = quarters[..., 0, :] | quarters[..., 1, :] << 4 | quarters[..., 2, :] << 8 | quarters[..., 3, :] << 12
        return units.reshape(len(q), -1).view(np.int8)
    return (q ^ 128).view(np.int8).reshape(len(q), -1)


def quantize(rows: Array, weights: str, block: int, dtype: str) -> tuple[Array, Array]:
    """rows [n, K] -> stored int8 [n, stored width] and scales [n, blocks] float32, which `dtype` holds exactly.

    Each block's scale maps its largest magnitude to the format's largest number. Integers from a better search come in
    through `pack_codes`.
    """
    n, width = rows.shape
    blocks = -(-width // block)
    padded = np.zeros((n, blocks * block), np.float32)
    padded[:, :width] = rows
    values = padded.reshape(n, blocks, block)
    largest = FP8_MAX if weights == "fp8" else ZERO[weights] - 1
    scales = rounded(np.abs(values).max(-1) / largest, dtype)
    units = np.divide(values, scales[..., None], out=np.zeros_like(values), where=scales[..., None] > 0)
    if weights == "fp8":
        return _fp8_codes(units).reshape(n, -1), scales
    q = np.clip(np.rint(units), -largest, largest) + ZERO[weights]
    return pack_codes(q.astype(np.uint8), weights), scales


def _fp8_codes(values: Array) -> Array:
    """To the nearest e4m3, ties to the even code, beyond the largest to the largest: int8."""
    magnitude = np.minimum(np.abs(values), FP8_MAX)
    above = np.searchsorted(FP8, magnitude).clip(1)
    middle = (FP8[above - 1] + FP8[above]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    return (code + np.where(np.signbit(values), 128, 0)).astype(np.uint8).view(np.int8)


def unpack(stored: Array, scales: Array, weights: str, block: int, width: int) -> Array:
    """The numbers that stored [.., N, stored width] and scales [.., N, blocks] stand for: [.., N, width] float32."""
    if weights == "int4":
        units = np.ascontiguousarray(stored).view("<u2").reshape(*scales.shape, block // 4)
        values = np.concatenate([units >> bits & 15 for bits in (0, 4, 8, 12)], -1).astype(np.float32) - 8
    elif weights == "int8":
        values = stored.reshape(*scales.shape, block).astype(np.float32)
    else:
        code = stored.view(np.uint8).reshape(*scales.shape, block)
        magnitude = np.append(FP8, 480.0)[code & 127]
        values = np.where(code >= 128, -magnitude, magnitude).astype(np.float32)
    values *= scales.astype(np.float32)[..., None]
    return values.reshape(*scales.shape[:-1], -1)[..., :width]
