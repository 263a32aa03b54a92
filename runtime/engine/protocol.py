"""What an engine is: it encodes images, keeps what sequences need between steps, and runs the decoder over a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from moevlm.runtime.core.errors import EngineError, shown
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.states import PagedKV, Recurrent, StateSpec
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.step import EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, VisualFeatures
from moevlm.runtime.request.vision_inputs import VisionInputs

TEXT_ALONE = "images for a model of text alone"  # where an engine is asked for what it has not


class Engine(Protocol):
    """One loaded target of a bundle. Threads may share it; steps run one after the other.

    limits: of a step. states: what a sequence keeps between steps.
    cancellation: ends a call that runs by Cancelled, where the engine can be interrupted. The engine stays usable;
    what the step's sequences keep does not.
    """

    @property
    def limits(self) -> EngineLimits: ...
    @property
    def states(self) -> tuple[StateSpec, ...]: ...

    def reserve(self, pages: int, rows: int) -> None:
        """Make room for pages and rows of recurrent states, page 0 and row 0 included, which are no sequence's.

        There is one pool: what an earlier call reserved is lost. Raises EngineError if there is too little memory.
        """
        ...

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:
        """Visual tokens of all images. Raises EngineError for images that do not fit."""
        ...

    def forward(
        self, step: Step, visual: Sequence[FeatureRows] = (), cancellation: Cancellation | None = None
    ) -> StepOutput:
        """Run a step. visual: slices of this engine's features, through which visual_index counts.

        Raises EngineError for a step that does not fit the limits, the pool or the features.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used any more. Once more does nothing."""
        ...


def check_reserve(states: tuple[StateSpec, ...], pages: int, rows: int) -> None:
    """Raises EngineError unless a sequence finds a page, and a row if a state is recurrent."""
    for name, count, kind in (("pages", pages, PagedKV), ("rows", rows, Recurrent)):
        least = 2 if any(isinstance(state, kind) for state in states) else 0
        if count < least:
            raise EngineError(f"unsupported value {name} = {count} (allowed: {least} or more)")


def check_vision(inputs: VisionInputs) -> None:
    """Raises EngineError unless image_start rises from 0 to the number of patches."""
    starts, patches = inputs.image_start, inputs.patches
    if starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or starts[-1] != patches or (np.diff(starts) < 1).any():
        raise EngineError(f"image_start = {shown(starts.tolist())} (allowed: rising from 0 to the {patches} patches)")


def check_step(
    step: Step, visual: Sequence[FeatureRows], limits: EngineLimits, model: ModelMetadata, pages: int, rows: int
) -> None:
    """Raises EngineError, naming the value, for a step that does not fit.

    pages, rows: of the pool, those that are no sequence's included; 0 where the engine keeps none.
    """
    tokens, sequences, wanted = step.tokens, step.sequences, len(step.logits_index)
    _check_shapes(step, tokens, sequences, wanted)
    for what, count, least, most in (
        ("sequences", sequences, 1, limits.max_sequences),
        ("tokens", tokens, 1, limits.max_tokens),
        ("rows of logits", wanted, 0, limits.max_logits),
    ):
        if not least <= count <= most:
            raise EngineError(f"a step of {count} {what} (allowed: {least} to {most})")
    # Lists: of so few numbers they are faster than arrays.
    starts, kept = step.query_start.tolist(), step.context_len.tolist()
    if starts[0] != 0 or starts[-1] != tokens or starts != sorted(starts):
        raise EngineError(f"query_start = {shown(starts)} (allowed: rising from 0 to the {tokens} tokens)")
    _check_range("context_len", kept, 0, limits.max_context)
    _check_range("input_ids", step.input_ids.tolist(), 0, model.vocabulary - 1)
    for one in visual:
        if not 0 <= one.start < one.stop <= one.features.rows:
            raise EngineError(f"visual features {one.start} to {one.stop} (allowed: of 0 to {one.features.rows})")
    seen = sum(one.rows for one in visual)
    if limits.max_visual is not None and seen > limits.max_visual:
        raise EngineError(f"a step of {seen} visual rows (allowed: up to {limits.max_visual})")
    _check_range("visual_index", step.visual_index.tolist(), -1, seen - 1)
    _check_range("logits_index", step.logits_index.tolist(), 0, tokens - 1)
    ends = [context + end - start for context, start, end in zip(kept, starts, starts[1:], strict=False)]
    _check_range("the length of a sequence", ends, 0, limits.max_context)
    if pages:
        needed = [-(-end // limits.page_size) if end > context else 0 for end, context in zip(ends, kept, strict=True)]
        _check_table(step.page_table, needed, ends, pages)
        _check_range("copies", [page for pair in step.copies for page in pair], 1, pages - 1)
    if rows:
        _check_range("state_row", step.state_row.tolist(), 1, rows - 1)
        _check_range("cleared", list(step.cleared), 1, rows - 1)
        _check_row_copies(step, rows)
    if model.bidirectional_images:
        _check_visible_end(step.visible_end, starts, kept)
    if model.query_scale is not None:
        shape = None if step.query_scale is None else step.query_scale.shape
        if shape != (tokens,):
            raise EngineError(f"query_scale has the shape {shape and list(shape)} (allowed: {[tokens]})")


def _check_row_copies(step: Step, rows: int) -> None:
    """Copies and clearing may run in any order."""
    sources, targets = ([pair[i] for pair in step.row_copies] for i in (0, 1))
    _check_range("row_copies", [*sources, *targets], 1, rows - 1)
    taken = {*sources, *step.cleared}
    for target in targets:
        if target in taken:
            raise EngineError(f"row_copies has the target {target} (allowed: neither a source nor cleared, and once)")
        taken.add(target)
    if wrong := {*sources} & {*step.cleared}:
        raise EngineError(f"row_copies has the source {min(wrong)} (allowed: a row that is not cleared)")


def _check_visible_end(ends: np.ndarray | None, starts: list[int], kept: list[int]) -> None:
    """A token sees itself at least, and nothing behind the last of its sequence in this step."""
    shape, tokens = None if ends is None else ends.shape, starts[-1]
    if ends is None or shape != (tokens,):
        raise EngineError(f"visible_end has the shape {shape and list(shape)} (allowed: {[tokens]})")
    for context, start, stop in zip(kept, starts, starts[1:], strict=False):
        least, most = np.arange(context + 1, context + stop - start + 1), context + stop - start
        own = ends[start:stop]
        for place in np.flatnonzero((own < least) | (own > most))[:1]:
            _check_range("visible_end", [int(own[place])], int(least[place]), most)


def _check_table(table: np.ndarray, needed: list[int], ends: list[int], pages: int) -> None:
    """needed: pages of each sequence. The table is long where sequences are: it is looked at as a whole."""
    columns = table.shape[1]
    if max(needed) > columns:
        end = ends[needed.index(max(needed))]
        raise EngineError(f"page_table has {columns} pages for {end} tokens (allowed: {max(needed)} or more)")
    used = np.arange(columns) < np.array(needed)[:, None]
    if ((table < used) | (table >= pages)).any():
        _check_range("page_table", table[used].tolist(), 1, pages - 1)
        _check_range("page_table", table.ravel().tolist(), 0, pages - 1)


def _check_shapes(step: Step, tokens: int, sequences: int, wanted: int) -> None:
    row = (tokens,)
    if (
        step.input_ids.shape == step.visual_index.shape == row
        and step.context_len.shape == step.state_row.shape == (sequences,)
        and step.query_start.shape == (sequences + 1,)
        and step.logits_index.shape == (wanted,)
        and step.page_table.ndim == 2
        and len(step.page_table) == sequences
    ):
        return
    for name, shape in (
        ("input_ids", row),
        ("visual_index", row),
        ("query_start", (sequences + 1,)),
        ("context_len", (sequences,)),
        ("state_row", (sequences,)),
        ("page_table", (sequences, step.page_table.shape[-1])),
        ("logits_index", (wanted,)),
    ):
        if (found := getattr(step, name).shape) != shape:
            raise EngineError(f"{name} has the shape {list(found)} (allowed: {list(shape)})")


def _check_range(name: str, values: list[int], least: int, most: int) -> None:
    if values and not least <= min(values) <= max(values) <= most:
        wrong = next(value for value in values if not least <= value <= most)
        raise EngineError(f"{name} has {wrong} (allowed: {least} to {most})")
