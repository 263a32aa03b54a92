"""From parts of sequences to the arrays of one step."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from moevlm.runtime.core.manifest import QueryScaleMetadata, RopeMetadata
from moevlm.runtime.engine.scheduler import Part
from moevlm.runtime.engine.step import Step
from moevlm.runtime.engine.visual import FeatureRows, step_features
from moevlm.runtime.request.positions import query_scales, rope_tables

_FIRST_ROWS = 256
_PAGE_COLUMNS = 8  # page tables grow by so many columns: few different shapes


class RopeRows:
    """Cosines and sines by position, of text, made ahead for many positions at once.

    Between two tokens the weights have pushed everything else out of the CPU's caches, and every call of numpy costs
    many times what it costs alone.
    """

    def __init__(self, rope: RopeMetadata) -> None:
        self._rope = rope
        self._made = 0
        self._cos = self._sin = np.empty((0, 0), np.float32)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions: [T] int64, the same on all axes. Returns (cos, sin), each [T, R / 2] float32."""
        needed = int(positions.max()) + 1
        if needed > self._made:
            self._made = max(_FIRST_ROWS, 1 << (needed - 1).bit_length())
            self._cos, self._sin = rope_tables(np.broadcast_to(np.arange(self._made), (3, self._made)), self._rope)
        return self._cos[positions], self._sin[positions]


class StepPacker:
    """Makes steps for one model."""

    def __init__(
        self,
        ropes: Items[RopeMetadata],
        *,
        whole_images: bool = False,
        query_scale: QueryScaleMetadata | None = None,
    ) -> None:
        """whole_images: a step holds all tokens of an image, which see each other. query_scale: of the model."""
        self._ropes, self._whole_images, self._query_scale = tuple(ropes), whole_images, query_scale
        self._rows = tuple(RopeRows(rope) for rope in ropes)
        self._singles: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def text(self, positions: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Rotary tables of text at these positions [T] int64, by rope group."""
        return {str(group): rows.at(positions) for group, rows in enumerate(self._rows)}

    def pack(self, parts: Items[Part]) -> tuple[Step, tuple[FeatureRows, ...]]:
        """One step of all parts, and the rows of visual features that it reads. Their images must have been encoded."""
        visual: tuple[FeatureRows, ...] = ()
        visible_end: np.ndarray | None = None
        if all(part.last and part.stop - part.start == 1 and part.sequence.generated for part in parts):
            starts, visual_index = self._single(len(parts))
            last = starts[:-1]
            later = [part.sequence for part in parts]
            ids = np.array([one.generated[-1] for one in later], np.int64)
            rope = self.text(np.array([one.prompt.next_position + len(one.generated) - 1 for one in later], np.int64))
            if self._whole_images:
                visible_end = np.array([part.stop for part in parts], np.int32)
        else:
            ends = np.cumsum([part.stop - part.start for part in parts])
            starts, last = (
                np.append(0, ends).astype(np.int32),
                (ends[[part.last for part in parts]] - 1).astype(np.int32),
            )
            ids = np.concatenate([part.sequence.ids(part.start, part.stop) for part in parts])
            visual_index, visual = step_features(
                (part.sequence.visual_rows(part.start, part.stop), part.sequence.features_of) for part in parts
            )
            positions = np.concatenate([part.sequence.positions(part.start, part.stop) for part in parts], axis=1)
            rope = {str(group): rope_tables(positions, one) for group, one in enumerate(self._ropes)}
            if self._whole_images:
                visible_end = np.concatenate([part.sequence.runs.visible_end(part.start, part.stop) for part in parts])
        step = Step(
            input_ids=ids,
            visual_index=visual_index,
            rope=rope,
            query_start=starts,
            context_len=np.array([part.start for part in parts], np.int32),
            page_table=_page_table(parts),
            state_row=np.array([part.sequence.state_row for part in parts], np.int32),
            logits_index=last,
            copies=tuple(copy for part in parts for copy in part.copies),
            cleared=tuple(row for part in parts for row in part.cleared),
            row_copies=tuple(copy for part in parts for copy in part.row_copies),
            visible_end=visible_end,
            query_scale=None if self._query_scale is None else query_scales(_places(parts), self._query_scale),
        )
        return step, visual

    def _single(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """query_start and visual_index of a step of one text token for each of `count` sequences."""
        if count not in self._singles:
            self._singles[count] = np.arange(count + 1, dtype=np.int32), np.full(count, -1, np.int64)
        return self._singles[count]


def _places(parts: Items[Part]) -> np.ndarray:
    """[T] int64: where each token of a step stands in its sequence."""
    return np.concatenate([np.arange(part.start, part.stop) for part in parts])


def _page_table(parts: Items[Part]) -> np.ndarray:
    tables = [part.sequence.table.pages for part in parts if part.sequence.table is not None]
    columns = -(-max(map(len, tables)) // _PAGE_COLUMNS) * _PAGE_COLUMNS
    table = np.zeros((len(parts), columns), np.int32)
    for row, pages in zip(table, tables, strict=True):
        row[: len(pages)] = pages
    return table
