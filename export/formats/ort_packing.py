"""Quantized weights in the byte order of ONNX Runtime's MatMulNBits, QMoE and GatherBlockQuantized."""

from dataclasses import replace

import numpy as np

from moevlm.export.formats.encoded import Encoded
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.stored import shared_form
from moevlm.export.graph.codes import Codes
from moevlm.export.graph.weights import Weight


def block_form(scheme: IntFormat, *weights: Weight) -> IntFormat:
    """As `shared_form`, in groups of a power of two: the kernels take no others."""
    form = shared_form(scheme, *weights)
    return replace(form, group_size=form.group_size & -form.group_size)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [.., group_size]: two 4-bit ones to a byte, the even one in the low half; 8-bit ones as they are."""
    return codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4


def pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """zeros [.., groups] as codes, the last byte filled up with 0."""
    padding = [*[(0, 0)] * (zeros.ndim - 1), (0, zeros.shape[-1] % 2)]
    return pack(zeros if bits == 8 else np.pad(zeros, padding), bits)


def packed(source: Weight, form: IntFormat, flat: bool = False) -> Encoded:
    """`values` [..., groups, group_size * bits / 8] uint8, scales [..., groups] float32, and, where the form has them,
    zeros [..., groups * bits / 8] uint8.

    flat: values are [..., K * bits / 8] instead.
    """
    *outer, width = source.shape
    groups, group_bytes = -(-width // form.group_size), form.group_size * form.bits // 8
    last = (groups * group_bytes,) if flat else (groups, group_bytes)
    byte = np.dtype(np.uint8)
    values, scales = ((*outer, *last), byte), ((*outer, groups), np.dtype(np.float32))
    zeros = [((*outer, -(-groups * form.bits // 8)), byte)] if form.zeros else []

    def parts(found: Codes) -> tuple[np.ndarray, ...]:
        made = pack(found.codes, form.bits), found.scales
        return made if found.zeros is None else (*made, pack_zeros(found.zeros, form.bits))

    return Encoded(source, form, parts, values, scales, *zeros)
