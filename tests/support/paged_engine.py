"""An engine of numpy whose next token depends on all that its pages and state rows hold: any fault in paging shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import msgspec
import numpy as np

from moevlm.runtime.core.manifest import LayerMetadata, ModelMetadata, RopeMetadata
from moevlm.runtime.core.states import PagedKV, Recurrent, StateSpec, page_bytes, row_bytes
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.pool_size import SEQUENCES
from moevlm.runtime.engine.protocol import check_step
from moevlm.runtime.engine.step import Candidates, EngineLimits, Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined
from moevlm.runtime.request.candidates import CandidateRow
from moevlm.runtime.request.positions import rope_tables
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampler import Sampler
from moevlm.runtime.request.sampling import SamplingParams
from moevlm.runtime.request.vision_inputs import VisionInputs

VOCABULARY = 41
ROPE = RopeMetadata(dim=4, theta=100.0, sections=(1, 1, 0), interleaved=False)
EOS, IMAGE = 3, VOCABULARY - 1
TOWER = GridTower(
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    channels=3,
    head_dim=4,
    rope_theta=1e4,
    position_grid=4,
    position_resampling="bilinear",
    deepstack=0,
)
MODEL = ModelMetadata(
    model_type="paged",
    hidden=1,
    vocabulary=VOCABULARY,
    context=2000,
    layers=(LayerMetadata(heads=1, kv_heads=1, key_dim=4, value_dim=4),),
    eos_token_ids=(EOS,),
    image_token_id=IMAGE,
    ropes=(ROPE,),
    vision=TOWER,
)
SEEING_MODEL = msgspec.structs.replace(
    MODEL, layers=tuple(msgspec.structs.replace(layer, bidirectional_images=True) for layer in MODEL.layers)
)
_EMPTY = -(1 << 40)
_PRIME = (1 << 31) - 1


def fold(state: int, value: int) -> int:
    """A state after one more token."""
    return (state * 1_000_003 + value + 17) % _PRIME


def seen(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Each value as it is if its token sees itself alone, else folded with the tokens behind it: so many in all."""
    found = []
    for at, (value, count) in enumerate(zip(values, counts, strict=True)):
        for later in values[at + 1 : at + count]:
            value = fold(value, later)
        found.append(value)
    return found


def logits_of(state: int) -> np.ndarray:
    """[VOCABULARY] float32, of a sequence in this state."""
    logits = np.random.default_rng(state).standard_normal(VOCABULARY).astype(np.float32) * 2
    logits[IMAGE] = -30  # what is generated may be a prompt
    return logits


def candidates_of(logits: np.ndarray, count: int = VOCABULARY) -> Candidates:
    """logits: [L, vocabulary] float32."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    total = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)).astype(np.float32)
    return Candidates(np.take_along_axis(logits, order, 1), order.astype(np.int32), total)


def row_of(logits: np.ndarray) -> CandidateRow:
    """logits: [vocabulary] float32."""
    found = candidates_of(logits[None])
    return CandidateRow(found.values[0], found.ids[0], float(found.log_sum_exp[0]), len(logits), lambda: logits)


class PagedEngine:
    """Keeps a number for each token in its pages: its id, or the first value of its visual feature.

    recurrent: keeps the folded tokens of a sequence in its state row, too, and its logits depend on that alone.
    Where a step says what tokens see, a token's number is that of all tokens up to there, see `seen`.
    """

    def __init__(self, limits: EngineLimits, *, recurrent: bool = False) -> None:
        self.limits = limits
        self.states: tuple[StateSpec, ...] = (PagedKV(layer=0, kv_heads=1, key_dim=4, value_dim=4),)
        if recurrent:
            self.states += (Recurrent(layer=0, name="folded", shape=(1,)),)
        self.recurrent = recurrent
        self.steps: list[Step] = []
        self.encoded: list[VisionInputs] = []
        self.before: Callable[[Step, Cancellation | None], None] | None = None
        self.reserve(2, 2)

    def reserve(self, pages: int, rows: int) -> None:
        self.pages = np.full((pages, self.limits.page_size), _EMPTY, np.int64)
        self.rows = np.full(rows, -1, np.int64)

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> HostFeatures:
        if cancellation is not None:
            cancellation.check()
        self.encoded.append(inputs)
        blocks = inputs.pixel_patches.reshape(-1, 4, inputs.pixel_patches.shape[1])
        embeds = np.rint(blocks.sum(axis=(1, 2), keepdims=True)[:, 0] * 1000).astype(np.float32)
        return HostFeatures(embeds, np.zeros((0, *embeds.shape), np.float32))

    def forward(
        self, step: Step, visual: Sequence[FeatureRows] = (), cancellation: Cancellation | None = None
    ) -> StepOutput:
        self.steps.append(step)
        if self.before is not None:
            self.before(step, cancellation)
        for source, target in step.copies:
            self.pages[target] = self.pages[source]
        for row in step.cleared:
            self.rows[row] = 0
        for source, target in step.row_copies:
            assert target not in (source, *step.cleared)
            self.rows[target] = self.rows[source]
        logits = np.zeros((step.tokens, VOCABULARY), np.float32)
        values = step.input_ids.copy()
        images = step.visual_index >= 0
        if images.any():
            values[images] = joined(visual).embeds[step.visual_index[images], 0].astype(np.int64)
        if step.visible_end is not None:
            rows = len(self.rows) if self.recurrent else 0
            check_step(step, visual, self.limits, SEEING_MODEL, len(self.pages), rows)
            before = step.context_len - step.query_start[:-1]
            places = np.arange(step.tokens) + np.repeat(before, np.diff(step.query_start))
            values = np.array(seen(values.tolist(), (step.visible_end - places).tolist()))
        size = self.limits.page_size
        for n in range(step.sequences):
            start, past = int(step.query_start[n]), int(step.context_len[n])
            for t in range(start, int(step.query_start[n + 1])):
                at = past + t - start
                page = int(step.page_table[n, at // size])
                assert page > 0
                self.pages[page, at % size] = values[t]
                row = int(step.state_row[n])
                if self.recurrent:
                    assert row > 0
                    self.rows[row] = fold(int(self.rows[row]), int(values[t]))
            end = past + int(step.query_start[n + 1]) - start
            kept = self.pages[step.page_table[n]].reshape(-1)[:end]
            assert (kept != _EMPTY).all()
            state = 0
            for value in kept.tolist():
                state = fold(state, value)
            if self.recurrent:
                assert state == self.rows[int(step.state_row[n])]
            logits[int(step.query_start[n + 1]) - 1] = logits_of(state)
        wanted = logits[step.logits_index]
        return StepOutput(candidates_of(wanted), partial(wanted.__getitem__))

    def close(self) -> None:
        pass


def check_rope(step: Step, positions: np.ndarray) -> None:
    """positions: [3, T], what the step's tables must stand for."""
    cos, sin = rope_tables(positions, ROPE)
    np.testing.assert_array_equal(step.rope["0"][0], cos)
    np.testing.assert_array_equal(step.rope["0"][1], sin)


def paged_runtime(engine: PagedEngine, chunk_tokens: int = 64, pages: int | None = None, **options: Any) -> Runtime:
    """A runtime without a tokenizer. pages: of the pool, page 0 included; by default as many as are of use."""
    memory = None
    if pages is not None:
        rows = (1 + 2 * SEQUENCES) * row_bytes(engine.states)
        memory = pages * page_bytes(engine.states, engine.limits.page_size) + rows
    return Runtime(MODEL, None, None, engine, chunk_tokens=chunk_tokens, cache_memory=memory, **options)


def prompt_of(ids: Sequence[int]) -> Prompt:
    return Prompt.from_ids(list(ids), [], MODEL)


@lru_cache(maxsize=4096)
def alone(ids: tuple[int, ...], new_tokens: int, params: SamplingParams) -> list[int]:
    """What a prompt is continued with, without pages and without company."""
    state, sampler = 0, Sampler(params, ids)
    tokens: list[int] = []
    for token in ids:
        state = fold(state, token)
    while len(tokens) < new_tokens and (params.ignore_eos or EOS not in tokens):
        tokens.append(sampler.choose(row_of(logits_of(state))).token_id)
        state = fold(state, tokens[-1])
    return tokens
