"""GPTQ: integers of 4 or 8 bits, eight or four to a 32-bit word along the input axis.

qweight [K * bits / 32, N], scales [groups, N], qzeros [groups, N * bits / 32] packed along N, g_idx [K]: the group of
each input. Value: (code - zero) * scale, zero = stored + 1 (checkpoint_format gptq) or as stored (gptq_v2). Column n of
the file is row n of the weight. With desc_act groups are scattered over the inputs; g_idx says where, exactly.
"""

from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.quantized.groups import Regrouped, group_size_of, require_side_by_side, scattered
from moevlm.export.checkpoint.quantized.layout import Format, Parts, Spelling, wrong_shape, wrong_value
from moevlm.export.checkpoint.quantized.nibbles import PER_WORD, from_words
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import FLOAT, Coded, CodeForm, Codes, grouped
from moevlm.export.graph.weights import Weight


@dataclass(frozen=True)
class GPTQ(Coded):
    """See the module's docstring. offset: what is added to a stored zero."""

    words: Stored
    scales: Stored
    zeros: Stored
    shape: tuple[int, ...]
    form: CodeForm
    offset: int

    def codes(self, start: int, stop: int) -> Codes:
        bits = self.form.bits
        codes = from_words(np.ascontiguousarray(self.words.columns(start, stop).T), bits)
        scales = np.ascontiguousarray(self.scales.columns(start, stop).astype(FLOAT).T)
        return Codes(grouped(codes, self.form.group_size), scales, self._zeros(start, stop))

    def _zeros(self, start: int, stop: int) -> np.ndarray | None:
        per_word = PER_WORD[self.form.bits]
        first = start // per_word
        stored = from_words(self.zeros.columns(first, -(-stop // per_word)), self.form.bits)
        zeros = stored[:, start - first * per_word : stop - first * per_word].T + np.uint8(self.offset)
        most = (1 << self.form.bits) - 1
        if self.offset and (zeros > most if most < 255 else zeros == 0).any():
            # 0 - 1 in unsigned bits: writers let it run into the zero beside it, and readers differ in what it is.
            raise wrong_value(self.zeros, f"{most}, which would be the zero {most + 1}", f"0 to {most - 1}")
        if self.form.zeros:
            return np.ascontiguousarray(zeros)
        if not (zeros == self.form.code_of_zero).all():
            other = int(zeros[zeros != self.form.code_of_zero][0])
            allowed = f"{self.form.code_of_zero}, for the config says that weights are symmetric"
            raise wrong_value(self.zeros, f"the zero {other}", allowed)
        return None


def _read(parts: Parts) -> Weight:
    words, scales, scheme = parts["codes"], parts.floats("scale"), parts.scheme
    bits = scheme.bits or 4
    if len(words.shape) != 2 or len(scales.shape) != 2 or 0 in (*words.shape, *scales.shape):
        raise wrong_shape(words if len(words.shape) != 2 else scales, "2 dimensions, none of them 0")
    k, n = words.shape[0] * PER_WORD[bits], words.shape[1]
    groups = scales.shape[0]
    parts.of_shape("scale", (groups, n))
    group_size = group_size_of(parts, scales, k, groups)
    parts.of_dtype("zero", "int32")
    parts.of_shape("zero", (groups, -(-n // PER_WORD[bits])))
    form = CodeForm(f"int{bits}", group_size, 1, not scheme.symmetric, scales.dtype.name)
    weight = GPTQ(words, scales, parts["zero"], (n, k), form, parts.settings.zero_offset)
    if "index" not in parts:
        require_side_by_side(parts, groups, ".g_idx")
        return weight
    order = scattered(parts, k, groups, group_size)
    return weight if order is None else Regrouped(weight, order)


FORMAT = Format(
    "gptq",
    ("int32",),
    (Spelling(".qweight", {"scale": ".scales", "zero": ".qzeros"}, {"index": ".g_idx"}, ".weight"),),
    _read,
    ("gptq", "auto-round"),
)
