"""One sequence in an engine's pages: prefill in chunks, then one token at a time."""

from __future__ import annotations

import numpy as np

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import ModelMetadata, RopeMetadata
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Engine, VisualFeatures
from moevlm.runtime.engine.step import Step
from moevlm.runtime.request.positions import rope_tables
from moevlm.runtime.request.prompt import Prompt

TABLE_STEP = 64  # decoding makes its rotary tables for so many tokens at a time
Tables = tuple[np.ndarray, np.ndarray]


class SingleSequence:
    """A prompt and what follows it. Raises Cancelled, before its next step or within one, after a cancellation."""

    def __init__(
        self,
        engine: Engine,
        model: ModelMetadata,
        prompt: Prompt,
        visual: VisualFeatures | None,
        pages: list[int],
        row: int,
        cancellation: Cancellation,
    ) -> None:
        """visual: features of the prompt's images. pages: that it may fill, in order. row: of recurrent states."""
        rows = 0 if visual is None else len(visual.embeds)
        if rows != prompt.image_tokens:
            raise EngineError(f"{rows} visual features for {prompt.image_tokens} image tokens")
        self._engine, self._model, self._prompt, self._visual = engine, model, prompt, visual
        self._pages, self._row = np.array([pages], np.int32), np.array([row], np.int32)
        self._cancellation = cancellation
        self._length = 0
        self._text = np.full(1, -1, np.int64)
        self._later = [_LaterTables(rope, prompt.next_position) for rope in model.ropes]

    def prefill(self, chunk_tokens: int) -> np.ndarray:
        """Run the prompt through the decoder. Returns the logits [vocabulary] float32 of what follows it."""
        prompt, size = self._prompt, len(self._prompt.ids)
        while True:
            part = slice(self._length, min(self._length + chunk_tokens, size))
            positions = prompt.positions[:, part]
            tables = {str(group): rope_tables(positions, rope) for group, rope in enumerate(self._model.ropes)}
            logits = self._forward(prompt.ids[part], prompt.visual_index[part], tables, part.stop == size)
            if logits is not None:
                self._visual = None
                return logits

    def decode(self, token: int) -> np.ndarray:
        """Append a token. Returns the logits [vocabulary] float32 of what follows it."""
        later = self._length - len(self._prompt.ids)
        tables = {str(group): made.of(later) for group, made in enumerate(self._later)}
        logits = self._forward(np.array([token], np.int64), self._text, tables, True)
        assert logits is not None
        return logits

    def _forward(
        self, ids: np.ndarray, visual_index: np.ndarray, rope: dict[str, Tables], last: bool
    ) -> np.ndarray | None:
        self._cancellation.check()
        step = Step(
            input_ids=ids,
            visual_index=visual_index,
            rope=rope,
            query_start=np.array([0, len(ids)], np.int32),
            context_len=np.array([self._length], np.int32),
            page_table=self._pages[:, : -(-(self._length + len(ids)) // self._engine.limits.page_size)],
            state_row=self._row,
            logits_index=np.array([len(ids) - 1] if last else [], np.int32),
            cleared=() if self._length else (int(self._row[0]),),
        )
        visual = self._visual if (visual_index >= 0).any() else None
        output = self._engine.forward(step, visual, self._cancellation)
        self._length += len(ids)
        return output.logits(0) if last else None


class _LaterTables:
    """Rotary tables of generated tokens, made for many at once: between two tokens the weights have pushed everything
    else out of the CPU's caches, and every call of numpy costs many times what it costs alone.
    """

    def __init__(self, rope: RopeMetadata, first: int) -> None:
        """first: the position on every axis of the first token after the prompt."""
        self._rope, self._first = rope, first
        self._begin = 0
        self._cos = self._sin = np.empty((0, 0), np.float32)

    def of(self, token: int) -> Tables:
        """cos and sin [1, R / 2] of the token after `token` others that were generated."""
        if not self._begin <= token < self._begin + len(self._cos):
            positions = self._first + np.arange(token, token + TABLE_STEP)
            self._begin = token
            self._cos, self._sin = rope_tables(np.broadcast_to(positions, (3, TABLE_STEP)), self._rope)
        row = slice(token - self._begin, token - self._begin + 1)
        return self._cos[row], self._sin[row]
