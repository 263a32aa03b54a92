"""One prompt of a batch, which of its tokens a step takes, and where the logits of these go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.request.image_runs import ImageRuns
from moevlm.runtime.request.positions import query_scales, rope_tables
from moevlm.runtime.request.prompt import Prompt

Array = np.ndarray


class BatchSequence:
    """A prompt and the tokens that will follow it, as steps take them.

    ids, visual_index: [S] int64. visible_end: [S] int32. query_scale: [S] float32, or None.
    ropes: by rope group cos and sin, each [S, R / 2] float32. runs: of its images' tokens.
    prompt: how many of the S tokens it has. length: how many went through the engine. pages: [M] int32.
    """

    def __init__(self, prompt: Prompt, model: ModelMetadata, steps: int, first_visual: int, pages: Array) -> None:
        self.prompt, self.length, self.pages = len(prompt.ids), 0, pages
        self.runs = ImageRuns.of(prompt.visual_index)
        self.ids = np.concatenate([prompt.ids, np.zeros(steps, np.int64)])
        index = np.where(prompt.visual_index < 0, -1, prompt.visual_index + first_visual)
        self.visual_index = np.concatenate([index, np.full(steps, -1)])
        self.visible_end = self.runs.visible_end(0, len(self.ids))
        scale = model.query_scale
        self.query_scale = None if scale is None else query_scales(np.arange(len(self.ids)), scale)
        after = np.broadcast_to(prompt.next_position + np.arange(steps), (3, steps))
        positions = np.concatenate([prompt.positions, after], axis=1)
        self.ropes = {str(group): rope_tables(positions, rope) for group, rope in enumerate(model.ropes)}


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of sequence `number` in a step."""

    number: int
    start: int
    stop: int


class LogitPlaces:
    """Where the rows of logits of a prefill go: [total, vocabulary], prompt after prompt."""

    def __init__(self, sequences: Sequence[BatchSequence], every_position: bool) -> None:
        self._every, self._lengths = every_position, [sequence.prompt for sequence in sequences]
        self._offsets = np.cumsum([0, *self._lengths])
        self.total = int(self._offsets[-1]) if every_position else len(sequences)

    def of(self, spans: Sequence[Span]) -> tuple[Array, Array]:
        """Rows of a step whose logits are wanted, and their places: [L] int64 each."""
        index, targets, first = [], [], 0
        for span in spans:
            count = span.stop - span.start
            if self._every:
                index.append(first + np.arange(count))
                targets.append(self._offsets[span.number] + np.arange(span.start, span.stop))
            elif span.stop == self._lengths[span.number]:
                index.append(np.array([first + count - 1]))
                targets.append(np.array([span.number]))
            first += count
        return np.concatenate([np.zeros(0, np.int64), *index]), np.concatenate([np.zeros(0, np.int64), *targets])
