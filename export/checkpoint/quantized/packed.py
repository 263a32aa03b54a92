"""compressed-tensors' pack-quantized: integers of 4 or 8 bits, eight or four to a 32-bit word along K.

Value: (code - zero) * scale; without weight_zero_point the zero is 2 ** (bits - 1). weight_packed [N, K * bits / 32],
weight_scale [N, groups], weight_zero_point [N * bits / 32, groups] packed along N, weight_shape: N and K.
weight_g_idx [K], of activation ordering: the group of each column.
"""

from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.quantized.groups import (
    Regrouped,
    group_size_of,
    require_side_by_side,
    require_symmetric,
    scattered,
)
from moevlm.export.checkpoint.quantized.layout import Format, Parts, Spelling, matrix_shape, wrong_shape, wrong_value
from moevlm.export.checkpoint.quantized.nibbles import PER_WORD, from_words, packed_bits
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import FLOAT, Coded, CodeForm, Codes, grouped
from moevlm.export.graph.weights import Weight


@dataclass(frozen=True)
class Packed(Coded):
    """See the module's docstring. zeros: None where groups have none. [N, K] or [E, N, K]."""

    packed: Stored
    scales: Stored
    zeros: Stored | None
    shape: tuple[int, ...]
    form: CodeForm

    def codes(self, start: int, stop: int) -> Codes:
        codes = from_words(self.packed.rows(start, stop), self.form.bits)[..., : self.shape[-1]]
        scales = self.scales.rows(start, stop).astype(FLOAT)
        return Codes(grouped(codes, self.form.group_size), scales, self._zeros(start, stop))

    def _zeros(self, start: int, stop: int) -> np.ndarray | None:
        if self.zeros is None:
            return None
        if len(self.shape) == 3:  # all rows of some experts
            words, rows = self.zeros.rows(start, stop), slice(self.shape[1])
        else:
            per_word = PER_WORD[self.form.bits]
            first = start // per_word
            words = self.zeros.rows(first, -(-stop // per_word))
            rows = slice(start - first * per_word, stop - first * per_word)
        along = from_words(words.swapaxes(-1, -2), self.form.bits).swapaxes(-1, -2)
        return np.ascontiguousarray(along[..., rows, :])


def _read(parts: Parts) -> Weight:
    packed, scales = parts["codes"], parts.floats("scale")
    outer, n, words = matrix_shape(packed)
    k = _width(parts, outer, n)
    bits = packed_bits(packed, words, k)
    if scales.shape[:-1] != (*outer, n):
        raise wrong_shape(scales, f"{[*outer, n, 'groups']} for {[*outer, n, k]} weights")
    group_size = group_size_of(parts, scales, k, scales.shape[-1])
    zeros = None
    if "zero" in parts:
        parts.of_dtype("zero", "int32")
        zeros = parts.of_shape("zero", (*outer, -(-n // PER_WORD[bits]), scales.shape[-1]))
    else:
        require_symmetric(parts, "_zero_point")
    form = CodeForm(f"int{bits}", group_size, 1, zeros is not None, scales.dtype.name)
    weight = Packed(packed, scales, zeros, (*outer, n, k), form)
    if "index" not in parts:
        require_side_by_side(parts, scales.shape[-1], ".weight_g_idx")
        return weight
    order = scattered(parts, k, scales.shape[-1], group_size)
    return weight if order is None else Regrouped(weight, order)


def _width(parts: Parts, outer: tuple[int, ...], n: int) -> int:
    parts.of_dtype("shape", "int64", "int32")
    stated = parts.of_shape("shape", (2,), (3,), *((size, 2) for size in outer))
    found = stated.rows(0, stated.shape[0]).astype(np.int64)
    sizes = found if found.ndim == 1 else found[0]
    if found.ndim == 2 and not (found == sizes).all():
        raise wrong_value(stated, "shapes that differ", "one shape for all experts")
    *_, rows, width = (int(size) for size in sizes)
    if rows != n or not 1 <= width <= 1 << 31:
        raise wrong_value(
            stated, [int(size) for size in sizes], f"{[n, 'columns']}, as many rows as {parts['codes'].name}"
        )
    return width


PACKED = Format(
    "int",
    ("int32",),
    (
        Spelling(
            "_packed",
            {"scale": "_scale", "shape": "_shape"},
            {"zero": "_zero_point", "index": "_g_idx"},
        ),
    ),
    _read,
)
