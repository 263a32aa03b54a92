"""Quantized weights in the byte order of ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized."""

import numpy as np

from moevlm.export.formats.encoded import Encoded
from moevlm.export.formats.integers import IntFormat
from moevlm.export.graph.weights import Weight


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [.., group_size]: two 4-bit ones to a byte, the even one in the low half; 8-bit ones as they are."""
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def packed(source: Weight, form: IntFormat, flat: bool = False) -> Encoded:
    """`values` [..., groups, group_size * bits / 8] uint8 and `scales` [..., groups] float32.

    flat: values are [..., K * bits / 8] instead.
    """
    *outer, width = source.shape
    groups, group_bytes = -(-width // form.group_size), form.group_size * form.bits // 8
    last = (groups * group_bytes,) if flat else (groups, group_bytes)

    shapes = ((*outer, *last), np.dtype(np.uint8)), ((*outer, groups), np.dtype(np.float32))
    return Encoded(source, form, lambda found: (pack(found.codes, form.bits), found.scales), *shapes)
