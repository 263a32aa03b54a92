"""What rows of a weight become in a format: a checkpoint's own codes where the format holds them, else rounded anew."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from moevlm.export.formats.base import WeightFormat, held
from moevlm.export.formats.integers import SMALLEST_GROUP, IntFormat
from moevlm.export.formats.registry import INTEGERS, weight_format
from moevlm.export.graph.codes import Coded, CodeForm, Codes, coded, grouped
from moevlm.export.graph.weights import Weight, WeightTensor, uncast

LARGEST_GROUP = 256  # of the CPU kernels


@dataclass(frozen=True)
class EncodedFrom:
    """What an engine's tensor of codes is made of."""

    weight: Weight
    form: WeightFormat

    @property
    def own(self) -> bool:
        """Whether the codes are the checkpoint's."""
        return own_codes(self.weight, self.form) is not None

    def rows(self, start: int, stop: int) -> Codes:
        """See `encoded`."""
        return encoded(self.weight, self.form, start, stop)


def recoded(weights: Iterable[Weight]) -> dict[str, int]:
    """What became of weights that a checkpoint holds in codes, and of how many: {"int4 kept": 96, "fp4 to int8": 2}."""
    return dict(sorted(Counter(filter(None, map(_fate, weights))).items()))


def weights_of(model: ir.Model) -> Iterator[Weight]:
    """The recipes of all initializers that have one."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    yield from (tensor.weight for tensor in tensors if isinstance(tensor, WeightTensor))


def _fate(weight: Weight) -> str:
    encoding: EncodedFrom | None = getattr(weight, "encoding", None)
    own = coded(uncast(weight) if encoding is None else encoding.weight)
    if own is None:
        return ""
    if encoding is not None and encoding.own:
        return f"{own.form.kind} kept"
    zeros = " with zeros" if own.form.zeros else ""
    return f"{own.form.kind}{zeros} to {weight.dtype.name if encoding is None else encoding.form.name}"


def keeping(form: WeightFormat, *weights: Weight) -> WeightFormat:
    """The format with what it takes to keep the weights' own codes exactly: places for zeros, scales that hold theirs.

    Scales of other weights are rounded to the dtype of `form`, or to float32 where the dtypes of all differ.
    """
    roomy = replace(form, zeros=True) if isinstance(form, IntFormat) and form.bits == 4 else form
    kept = [own.form for weight in weights if (own := own_codes(weight, roomy)) is not None]
    dtypes = {own.scales for own in kept} | ({form.scales} if len(kept) < len(weights) else set())
    scales = dtypes.pop() if len(dtypes) == 1 else "float32"
    if scales not in (form.scales, "float16"):
        scales = "float32"  # not bfloat16 beside float16: the oldest GPUs do not have it
    made = weight_format(form.name, form.group_size, scales)
    return replace(made, zeros=True) if isinstance(made, IntFormat) and any(own.zeros for own in kept) else made


def encoded(weight: Weight, form: WeightFormat, start: int, stop: int) -> Codes:
    """Rows [start:stop] of the first axis of [..., K] as `WeightFormat.encode` gives them, all outer axes as one.

    With zeros where the format has them. Codes that a checkpoint has stay as they are, see `own_codes`; scales are
    rounded to the format's dtype.
    """
    own = own_codes(weight, form)
    if own is not None:
        return _regrouped(own.codes(start, stop), own, form)
    rows = weight.rows(start, stop)
    codes, scales = form.encode(rows.reshape(-1, rows.shape[-1]).astype(np.float32, copy=False))
    return Codes(codes, scales, np.full(scales.shape, form.zero, np.uint8) if _has_zeros(form) else None)


def own_codes(weight: Weight, form: WeightFormat) -> Coded | None:
    """The weight as a checkpoint holds it in codes, if `form` holds the same: its kind, groups that divide those."""
    own = coded(weight)
    return own if own is not None and _holds(form, own.form, weight.shape[-1]) else None


def kept_form(weight: Weight, scheme: IntFormat) -> IntFormat | None:
    """The integers in which the CPU's kernels can keep a weight's own codes; None where they cannot, or it has none.

    scheme: of weights that have no codes; its group size is taken where the checkpoint's is too large.
    """
    own = coded(weight)
    if own is None or own.form.kind not in INTEGERS or (own.form.zeros and own.form.bits != 4):
        return None
    size, width = own.form.group_size, weight.shape[-1]
    if size >= width or size > LARGEST_GROUP:  # a scale for the whole row fits groups of any size
        fitting = (scheme.group_size, 128, 64, 32, SMALLEST_GROUP)
        size = next((small for small in fitting if size >= width or size % small == 0), 0)
    if not size or size % SMALLEST_GROUP:
        return None
    return replace(scheme, bits=INTEGERS[own.form.kind], group_size=size, zeros=own.form.zeros)


def shared_form(scheme: IntFormat, *weights: Weight) -> IntFormat:
    """One format for weights that a kernel reads with the same: one that keeps most codes, else the scheme.

    Of several group sizes the smallest, where it divides the others; zeros if one of them has some.
    """
    forms = [form for weight in weights if (form := kept_form(weight, scheme)) is not None]
    best = min(forms, key=lambda form: (-form.bits, form.group_size), default=scheme)
    return replace(best, zeros=best.bits == 4 and any(form.zeros for form in forms))


def _has_zeros(form: WeightFormat) -> TypeGuard[IntFormat]:
    return isinstance(form, IntFormat) and form.zeros


def _holds(form: WeightFormat, own: CodeForm, width: int) -> bool:
    fits = own.group_size % form.group_size == 0 or own.group_size >= width
    return own.kind == form.name and fits and (_has_zeros(form) or not own.zeros)


def _regrouped(found: Codes, own: Coded, form: WeightFormat) -> Codes:
    """Codes in the format's smaller groups, whose scales are those of the groups that they were part of."""
    size, width = found.codes.shape[-1], own.shape[-1]
    codes = found.codes.reshape(-1, found.codes.shape[-2] * size)[:, :width]
    if width % form.group_size:
        filled = np.full((len(codes), -width % form.group_size), own.form.code_of_zero, np.uint8)
        codes = np.concatenate([codes, filled], 1)
    from_group = np.arange(0, width, form.group_size) // size
    scales = held(found.scales.reshape(len(codes), -1)[:, from_group], form.scales)
    zeros = None
    if _has_zeros(form):
        own_zeros = np.full(found.scales.shape, form.zero, np.uint8) if found.zeros is None else found.zeros
        zeros = own_zeros.reshape(len(codes), -1)[:, from_group]
    return Codes(grouped(np.ascontiguousarray(codes), form.group_size), scales, zeros)
