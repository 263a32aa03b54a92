"""How the codes of a weight follow rearrangements of it: joined, stacked, turned, picked and reordered rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moevlm.export.graph.codes import Coded, CodeForm, Codes, Levels, grouped
from moevlm.export.graph.rearranged import Picked, Reordered, RowBlocks, Swapped
from moevlm.export.graph.weights import Concat, Stack, Weight


def coded(weight: Weight) -> Coded | None:
    """The same weight in codes, where it is held so and every rearrangement on its way moves whole codes; else None."""
    match weight:
        case Coded():
            return weight
        case Concat(sources) | Stack(sources):
            found = [coded(source) for source in sources]
            parts = [part for part in found if part is not None]
            if len(parts) < len(found) or len({replace(part.form, block_rows=1, scales="") for part in parts}) > 1:
                return None
            if isinstance(weight, Stack):
                return _Stacked(parts) if len({part.form.block_rows for part in parts}) == 1 else None
            return _Joined(parts)
        case Swapped(source):
            whole = coded(source)  # blocks of one row would become groups of one weight
            turns = whole is not None and not whole.form.zeros and whole.form.block_rows > 1
            return _Turned(whole, weight) if whole is not None and turns else None
        case Picked(source):
            whole = coded(source)
            return _Picked(whole, weight) if whole is not None and len(weight.shape) == 3 else None
        case RowBlocks(source):
            whole = coded(source)
            return _RowBlocks(whole, weight) if whole is not None and len(weight.shape) == 2 else None
        case Reordered(source):
            whole = coded(source)
            return _Reordered(whole, weight) if whole is not None and len(weight.shape) == 2 else None
    return None


@dataclass(frozen=True)
class _Joined(Coded):
    """Parts one after the other along the first axis."""

    parts: Sequence[Coded]

    @property
    def shape(self) -> tuple[int, ...]:
        return Concat(self.parts).shape

    @property
    def form(self) -> CodeForm:
        form, matrices = _common(self.parts), len(self.shape) == 2
        whole = not matrices or all(part.shape[0] % form.block_rows == 0 for part in self.parts[:-1])
        same = all(part.form.block_rows == form.block_rows for part in self.parts)
        return form if whole and same else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        places = Concat(self.parts).places(start, stop)
        return _together([self.parts[i].codes(a, b) for i, a, b in places], np.concatenate)


@dataclass(frozen=True)
class _Stacked(Coded):
    """Parts under a new first axis."""

    parts: Sequence[Coded]

    @property
    def shape(self) -> tuple[int, ...]:
        return Stack(self.parts).shape

    @property
    def form(self) -> CodeForm:
        return _common(self.parts)

    def codes(self, start: int, stop: int) -> Codes:
        return _together([part.codes(0, part.shape[0]) for part in self.parts[start:stop]], np.stack)


@dataclass(frozen=True)
class _Moved(Coded):
    """The codes of `part`, moved as a recipe says."""

    part: Coded
    recipe: Swapped | Picked | RowBlocks | Reordered

    @property
    def shape(self) -> tuple[int, ...]:
        return self.recipe.shape


@dataclass(frozen=True)
class _Turned(_Moved):
    """[e, m, n] as [e, n, m]: a block of block_rows x group_size turns with its scale."""

    @property
    def form(self) -> CodeForm:
        form = self.part.form
        return replace(form, group_size=form.block_rows, block_rows=form.group_size)

    def codes(self, start: int, stop: int) -> Codes:
        found, form, (_, _, n) = self.part.codes(start, stop), self.form, self.part.shape
        flat = found.codes.reshape(*found.codes.shape[:2], -1)[..., :n]
        codes = grouped(flat.swapaxes(1, 2), form.group_size)
        blocks = found.scales[:, :: form.group_size].swapaxes(1, 2)
        return Codes(np.ascontiguousarray(codes), np.repeat(blocks, form.block_rows, 1)[:, :n])


@dataclass(frozen=True)
class _Picked(_Moved):
    """Some rows of each matrix of [e, m, n]."""

    recipe: Picked

    @property
    def form(self) -> CodeForm:
        form, places = self.part.form, self.recipe.places
        aligned = isinstance(places, range) and places.step == 1 and places.start % form.block_rows == 0
        return form if aligned else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        return self.part.codes(start, stop).moved(self.recipe.pick)


@dataclass(frozen=True)
class _RowBlocks(_Moved):
    """Blocks of rows of a matrix, at equal distances."""

    recipe: RowBlocks

    @property
    def form(self) -> CodeForm:
        form, blocks = self.part.form, self.recipe
        aligned = not any(number % form.block_rows for number in (blocks.size, blocks.every, blocks.first))
        return form if aligned else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        return _together([self.part.codes(a, b) for a, b in self.recipe.places(start, stop)], np.concatenate)


@dataclass(frozen=True)
class _Reordered(_Moved):
    """Each group of so many rows of a matrix in another order."""

    recipe: Reordered

    @property
    def form(self) -> CodeForm:
        form = self.part.form
        stays = form.block_rows % len(self.recipe.order) == 0  # each row, in its block
        return form if stays else replace(form, block_rows=1)

    def codes(self, start: int, stop: int) -> Codes:
        first, last = self.recipe.groups(start, stop)

        def turned(array: np.ndarray) -> np.ndarray:
            return self.recipe.turned(array)[start - first : stop - first]

        return self.part.codes(first, last).moved(turned)


def _common(parts: Sequence[Coded]) -> CodeForm:
    """The form of the first, with scales that hold those of all."""
    scales = {part.form.scales for part in parts}
    return replace(parts[0].form, scales=scales.pop() if len(scales) == 1 else "float32")


def _together(pieces: list[Codes], join: Callable[[list[np.ndarray]], np.ndarray]) -> Codes:
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    levels = [piece.levels for piece in pieces if piece.levels is not None]
    codes, scales = join([piece.codes for piece in pieces]), join([piece.scales for piece in pieces])
    both = None
    if len(levels) == len(pieces):
        both = Levels(join([level.groups for level in levels]), join([level.rows for level in levels]))
    return Codes(codes, scales, join(zeros) if zeros else None, both)
