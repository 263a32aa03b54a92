"""One step of an engine: T tokens of N sequences, packed side by side, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from moevlm.runtime.core import defaults


@dataclass(frozen=True)
class EngineLimits:
    """What a step may hold, and how tokens are kept. A target's numbers are data, not code.

    max_sequences, max_tokens, max_logits: of one step. max_context: tokens of one sequence. page_size: tokens of a
    page. max_visual: rows of visual features that a step uses; max_patches: of one image; None for any number.
    packed: a step may hold any mixture of sequences, and prompts are cut at any page's border; else it holds a token
    of each of several sequences, or a chunk of one prompt, which is cut at multiples of max_tokens alone.
    chunk_tokens: prompt tokens in a step, unless the caller says otherwise.
    mixed_tokens: prompt tokens beside running decodes, in a packed step; None for as many as in a step without.
    cache_memory: bytes that there are for pages and rows; None where memory is taken as it is written.
    max_pages: of the pool; None for any number.
    """

    max_sequences: int
    max_tokens: int
    max_logits: int
    max_context: int
    page_size: int
    max_visual: int | None = None
    max_patches: int | None = None
    packed: bool = False
    chunk_tokens: int = defaults.CHUNK_TOKENS
    mixed_tokens: int | None = None
    cache_memory: int | None = None
    max_pages: int | None = None


@dataclass(frozen=True)
class Step:
    """T tokens of N sequences; sequence n owns the rows query_start[n] to query_start[n + 1].

    input_ids: [T] int64. visual_index: [T] int64, row of the step's visual features, -1 for text.
    rope: by rope group, cos and sin, each [T, R / 2] float32.
    query_start: [N + 1] int32. context_len: [N] int32, tokens kept before this step.
    page_table: [N, M] int32, each sequence's pages in order; unused places are 0.
    state_row: [N] int32, row in recurrent states. logits_index: [L] int32, rows of T whose logits are wanted.
    copies: (source, target) pages copied before the step. cleared: state rows set to zero before the step.
    row_copies: (source, target) state rows copied before the step; none of them is cleared, no target is a source.
    visible_end: [T] int32, where the places in its sequence end that a token may see: behind the last token of its
    image, or else behind itself. None where no layer lets an image's tokens see later ones.
    query_scale: [T] float32, the factor on each token's queries. None where no layer scales queries by their place.
    """

    input_ids: np.ndarray
    visual_index: np.ndarray
    rope: Mapping[str, tuple[np.ndarray, np.ndarray]]
    query_start: np.ndarray
    context_len: np.ndarray
    page_table: np.ndarray
    state_row: np.ndarray
    logits_index: np.ndarray
    copies: tuple[tuple[int, int], ...] = ()
    cleared: tuple[int, ...] = ()
    row_copies: tuple[tuple[int, int], ...] = ()
    visible_end: np.ndarray | None = None
    query_scale: np.ndarray | None = None

    @property
    def sequences(self) -> int:
        """N."""
        return len(self.context_len)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens of L rows: enough for nearly every choice, at any vocabulary.

    values: [L, C] float32 logits, falling. ids: [L, C] int32, of equal logits the lower first.
    log_sum_exp: [L] float32, over the whole row.
    """

    values: np.ndarray
    ids: np.ndarray
    log_sum_exp: np.ndarray


@dataclass(frozen=True)
class StepOutput:
    """candidates: of the rows of logits_index. logits: one such row, [vocabulary] float32, until the next step runs.

    outputs: debug outputs by name, rows [T, ...], of an engine that has any.
    """

    candidates: Candidates
    logits: Callable[[int], np.ndarray]
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
