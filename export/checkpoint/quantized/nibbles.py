"""Codes of 4 bits, two to a byte or eight to a 32-bit word, one to a byte."""

import numpy as np

from moevlm.export.checkpoint.quantized.layout import wrong_shape
from moevlm.export.checkpoint.safetensors_file import Stored

PER_WORD = {4: 8, 8: 4}  # codes in 32 bits


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., K / 2] -> [..., K], the low nibble first."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0])
    np.right_shift(packed, 4, out=codes[..., 1])
    return codes.reshape(*packed.shape[:-1], -1)


def from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., W] -> uint8 [..., W * 32 / bits], the lowest bits first."""
    packed = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    return nibbles(packed) if bits == 4 else packed


def packed_bits(words: Stored, packed: int, unpacked: int) -> int:
    """The bits of a code, where `packed` words of 32 bits hold `unpacked` codes. Raises CheckpointError."""
    for bits, per_word in PER_WORD.items():
        if packed == -(-unpacked // per_word):
            return bits
    allowed = " or ".join(f"{-(-unpacked // per_word)} words for {bits} bits" for bits, per_word in PER_WORD.items())
    raise wrong_shape(words, f"{allowed} in the place of {packed}, for {unpacked} weights")
