"""What rows of a weight become in a format: a checkpoint's own codes where the format holds them, else rounded anew."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self, TypeGuard

import numpy as np
import onnx_ir as ir

from moevlm.export.formats.base import WeightFormat, held, rounded
from moevlm.export.formats.float4 import Float4Format
from moevlm.export.formats.integers import SMALLEST_GROUP, IntFormat
from moevlm.export.formats.registry import INTEGERS, weight_format
from moevlm.export.formats.widened import Widened, widened
from moevlm.export.graph.codes import Coded, CodeForm, Codes, Levels, grouped
from moevlm.export.graph.moved_codes import coded
from moevlm.export.graph.weights import Cast, Weight, WeightTensor, cast
from moevlm.runtime.core.dtypes import E4M3

LARGEST_GROUP = 256  # of the CPU kernels


@dataclass
class Deviation:
    """How far weights that are stored are from those of the checkpoint: sums over what was written so far."""

    squared_errors: float = 0.0
    squares: float = 0.0

    def add(self, exact: np.ndarray, stored: np.ndarray) -> None:
        """Two arrays of one size, of float32."""
        exact, error = exact.reshape(-1), (stored.reshape(-1) - exact.reshape(-1))
        self.squared_errors += float(np.vdot(error, error))
        self.squares += float(np.vdot(exact, exact))

    def __add__(self, other: Self) -> "Deviation":
        return Deviation(self.squared_errors + other.squared_errors, self.squares + other.squares)

    @property
    def relative(self) -> float:
        """Root mean square of the errors over that of the weights; 0 where nothing was written or all weights are 0."""
        return math.sqrt(self.squared_errors / self.squares) if self.squares else 0.0


@dataclass(frozen=True)
class EncodedFrom:
    """What an engine's tensor of codes is made of.

    deviation: of weights that a checkpoint holds in codes, from these.
    """

    weight: Weight
    form: WeightFormat
    deviation: Deviation = field(default_factory=Deviation, compare=False)

    @cached_property
    def codes(self) -> Coded | None:
        """See `own_codes`. Found once: it takes a look at every expert, and `rows` is called for each."""
        return own_codes(self.weight, self.form)

    @property
    def own(self) -> bool:
        """Whether the codes are the checkpoint's."""
        return self.codes is not None

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The codes of a checkpoint that the weight is made of, see `kinds_of`."""
        return kinds_of(self.weight)

    def rows(self, start: int, stop: int) -> Codes:
        """Rows [start:stop] of the first axis of [..., K] as `WeightFormat.encode` gives them, all outer axes as one.

        With zeros where the format has them. Codes that a checkpoint has stay as they are, see `own_codes`; scales are
        rounded to the format's dtype. Measures how far the rows are from the checkpoint's.
        """
        if (own := self.codes) is not None:
            codes = own.codes(start, stop)
            found = _regrouped(codes, own, self.form)
            if not np.array_equal(codes.scales, rounded(codes.scales, self.form.scales)):
                self._measure(self.weight.rows(start, stop), found)
            return found
        rows = self.weight.rows(start, stop)
        found = _encoded_anew(rows, self.form)
        if self.kinds:
            self._measure(rows, found)
        return found

    def _measure(self, rows: np.ndarray, found: Codes) -> None:
        decoded = self.form.decode(found.codes, found.scales, found.zeros)
        self.deviation.add(rows, decoded[:, : rows.shape[-1]])


@dataclass(frozen=True)
class Narrowed(Cast):
    """A cast of weights that a checkpoint holds in codes."""

    deviation: Deviation = field(default_factory=Deviation, compare=False)

    def rows(self, start: int, stop: int) -> np.ndarray:
        exact = self.source.rows(start, stop)
        found = self.converted(exact)
        self.deviation.add(exact.astype(np.float32, copy=False), found.astype(np.float32))
        return found


def narrowed(weight: Weight, dtype: np.dtype) -> Weight:
    """As `cast`; what it costs weights that a checkpoint holds in codes is measured."""
    made = cast(weight, dtype)
    return Narrowed(weight, np.dtype(dtype)) if made is not weight and kinds_of(weight) else made


def recoded(weights: Iterable[Weight]) -> dict[str, int]:
    """What became of weights that a checkpoint holds in codes, and of how many: {"int4 kept": 96, "fp4 to int8": 2}."""
    return dict(sorted(Counter(filter(None, map(_fate, weights))).items()))


def weight_errors(weights: Iterable[Weight]) -> dict[str, float]:
    """How far those that were written are from the checkpoint's, by the words of `recoded`; exact ones are left out.

    Root mean square of the errors over that of the weights.
    """
    sums: dict[str, Deviation] = {}
    for weight in weights:
        measured = weight if isinstance(weight, Narrowed) else _encoding(weight)
        if measured is not None and (fate := _fate(weight)):
            sums[fate] = sums.get(fate, Deviation()) + measured.deviation
    return {fate: found.relative for fate, found in sorted(sums.items()) if found.squared_errors}


def kinds_of(weight: Weight) -> tuple[str, ...]:
    """The codes of a checkpoint that a weight is made of, whatever was done to them: ("fp4", "int4 with zeros")."""
    if kind := getattr(weight, "kind", ""):
        return (kind,)
    sources = getattr(weight, "sources", None) or filter(None, [getattr(weight, "source", None)])
    return tuple(sorted({kind for source in sources for kind in kinds_of(source)}))


def weights_of(model: ir.Model) -> Iterator[Weight]:
    """The recipes of all initializers that have one."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    yield from (tensor.weight for tensor in tensors if isinstance(tensor, WeightTensor))


def _encoding(weight: Weight) -> EncodedFrom | None:
    return getattr(weight, "encoding", None)


def _fate(weight: Weight) -> str:
    encoding = _encoding(weight)
    if encoding is not None and (own := encoding.codes) is not None:
        return f"{own.part.form.kind} kept as {own.wider}" if isinstance(own, Widened) else f"{encoding.form.name} kept"
    kinds = kinds_of(weight) if encoding is None else encoding.kinds
    return f"{' and '.join(kinds)} to {weight.dtype.name if encoding is None else encoding.form.name}" if kinds else ""


def keeping(form: WeightFormat, *weights: Weight) -> WeightFormat:
    """The format with what it takes to keep the weights' own codes exactly: places for zeros, scales that hold theirs.

    Scales of other weights are rounded to the dtype of `form`, or to float32 where the dtypes of all differ. Those in
    two levels stay so.
    """
    if _has_levels(form):
        return form
    roomy = roomiest(form)
    kept = [own.form for weight in weights if (own := own_codes(weight, roomy)) is not None]
    dtypes = {own.scales for own in kept} | ({form.scales} if len(kept) < max(1, len(weights)) else set())
    scales = dtypes.pop() if len(dtypes) == 1 else "float32"
    if scales not in (form.scales, "float16"):
        scales = "float32"  # not bfloat16 beside float16: the oldest GPUs do not have it
    made = weight_format(form.name, form.group_size, scales)
    return replace(made, zeros=True) if isinstance(made, IntFormat) and any(own.zeros for own in kept) else made


def roomiest(form: WeightFormat) -> WeightFormat:
    """The format with places for zeros, if it can have some."""
    return replace(form, zeros=True) if isinstance(form, IntFormat) and form.bits == 4 else form


def _encoded_anew(rows: np.ndarray, form: WeightFormat) -> Codes:
    rows = rows.reshape(-1, rows.shape[-1]).astype(np.float32, copy=False)
    codes, scales = form.encode(rows)
    zeros = np.full(scales.shape, form.zero, np.uint8) if _has_zeros(form) else None
    return Codes(codes, scales, zeros, Levels(*form.levels(rows)) if _has_levels(form) else None)


def own_codes(weight: Weight, form: WeightFormat) -> Coded | None:
    """The weight as a checkpoint holds it in codes, if `form` holds the same: its numbers, groups that divide those."""
    own = coded(weight)
    return None if own is None else held_codes(own, form)


def held_codes(own: Coded, form: WeightFormat) -> Coded | None:
    """As `own_codes`, of a weight that a checkpoint holds in codes."""
    own = widened(own, form.name)
    return own if _holds(form, own.form, own.shape[-1]) else None


def kept_form(weight: Weight, scheme: IntFormat) -> IntFormat | None:
    """The integers in which the CPU's kernels can keep a weight's own codes; None where they cannot, or it has none.

    scheme: of weights that have no codes; its group size is taken where the checkpoint's is too large. If it has 8
    bits, fp4 is kept in those.
    """
    own = coded(weight)
    own = None if own is None else widened(own, scheme.name)
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


def cpu_form(scheme: IntFormat, *weights: Weight) -> IntFormat | Float4Format:
    """As `shared_form`, of moevlm's own kernels: these read fp4 as well, where all of the weights are held so."""
    sizes = {own.form.group_size for weight in weights if (own := coded(weight)) is not None and own.form.kind == "fp4"}
    form = Float4Format(min(sizes), scheme.scales) if sizes else scheme
    return form if sizes and all(own_codes(weight, form) for weight in weights) else shared_form(scheme, *weights)


def _has_zeros(form: WeightFormat) -> TypeGuard[IntFormat]:
    return isinstance(form, IntFormat) and form.zeros


def _has_levels(form: WeightFormat) -> TypeGuard[Float4Format]:
    return isinstance(form, Float4Format) and form.scales == E4M3


def _holds(form: WeightFormat, own: CodeForm, width: int) -> bool:
    if _has_levels(form) and (own.scales, own.group_size) != (E4M3, form.group_size):
        return False
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
    levels = None
    if _has_levels(form):
        assert found.levels is not None
        levels = Levels(found.levels.groups.reshape(len(codes), -1), found.levels.rows.reshape(-1))
    return Codes(grouped(np.ascontiguousarray(codes), form.group_size), scales, zeros, levels)
