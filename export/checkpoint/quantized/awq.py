"""AWQ, version gemm: 4-bit integers, eight to a 32-bit word along the output axis.

qweight [K, N / 8], qzeros [groups, N / 8], scales [groups, N]. The nibbles of a word, from the lowest bits on, are the
outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight. Value: (code - zero) * scale. Column n of the file is row n of the weight.
"""

from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.quantized.groups import group_size_of, require_symmetric
from moevlm.export.checkpoint.quantized.layout import Format, Parts, Spelling, wrong_shape
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import FLOAT, Coded, CodeForm, Codes, grouped

_PER_WORD = 8
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of the eight outputs stands


@dataclass(frozen=True)
class AWQ(Coded):
    """See the module's docstring."""

    words: Stored
    scales: Stored
    zeros: Stored | None
    shape: tuple[int, ...]
    form: CodeForm

    def codes(self, start: int, stop: int) -> Codes:
        codes = grouped(_rows(self.words, start, stop), self.form.group_size)
        scales = np.ascontiguousarray(self.scales.columns(start, stop).astype(FLOAT).T)
        return Codes(codes, scales, None if self.zeros is None else _rows(self.zeros, start, stop))


def _rows(words: Stored, start: int, stop: int) -> np.ndarray:
    """Outputs [start:stop] of words [K, N / 8] as rows [stop - start, K], one code to a byte."""
    first = start // _PER_WORD
    found = np.ascontiguousarray(words.columns(first, -(-stop // _PER_WORD)).T).view(np.uint32)
    codes = np.empty((len(found) * _PER_WORD, found.shape[1]), np.uint8)
    for i, nibble in enumerate(_NIBBLE):
        codes[i::_PER_WORD] = found >> np.uint32(4 * nibble) & np.uint32(15)
    return codes[start - first * _PER_WORD : stop - first * _PER_WORD]


def _read(parts: Parts) -> Coded:
    words, scales = parts["codes"], parts.floats("scale")
    if len(words.shape) != 2 or len(scales.shape) != 2 or 0 in (*words.shape, *scales.shape):
        raise wrong_shape(words if len(words.shape) != 2 else scales, "2 dimensions, none of them 0")
    k, n = words.shape[0], words.shape[1] * _PER_WORD
    groups = scales.shape[0]
    parts.of_shape("scale", (groups, n))
    group_size, zeros = group_size_of(parts, scales, k, groups), None
    if "zero" in parts:
        parts.of_dtype("zero", "int32")
        zeros = parts.of_shape("zero", (groups, words.shape[1]))
    else:
        require_symmetric(parts, ".qzeros")
    return AWQ(words, scales, zeros, (n, k), CodeForm("int4", group_size, 1, zeros is not None, scales.dtype.name))


FORMAT = Format(
    "awq", ("int32",), (Spelling(".qweight", {"scale": ".scales"}, {"zero": ".qzeros"}, ".weight"),), _read, ("awq",)
)
