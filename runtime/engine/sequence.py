"""One request on its way through an engine: its tokens, what is kept of them, and the text that they make."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import numpy as np

from moevlm.runtime.core.errors import MoevlmError
from moevlm.runtime.engine.answer import FinishReason, Meter, Phase, Piece
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.page_table import PageTable
from moevlm.runtime.engine.pages import KEY_BYTES, content_keys
from moevlm.runtime.engine.prompt_image import PromptImage
from moevlm.runtime.engine.rows import StateRow
from moevlm.runtime.engine.visual import FeatureRows, VisualFeatures
from moevlm.runtime.request.candidates import CandidateRow
from moevlm.runtime.request.detokenize import StreamDecoder
from moevlm.runtime.request.image_runs import ImageRuns
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampler import Sampler
from moevlm.runtime.request.sampling import SamplingParams

# A thread that comes back for its next piece steps for all: those that have not come back yet must not miss the step.
AHEAD = 4
Status = Literal["new", "waiting", "running", "ended"]
Listener = Callable[[list["Sequence"]], None]


@dataclass(frozen=True)
class Ending:
    """What ends a sequence. text: makes its text; None for token ids alone. eos: ids that end it; none are ignored.

    new_tokens: at most so many. deadline: on the clock of time.monotonic, None for none.
    """

    new_tokens: int
    eos: frozenset[int] = frozenset()
    text: StreamDecoder | None = None
    deadline: float | None = None


class Sequence:
    """A prompt and what was generated after it. whole_images: no step may end within its images.

    computed: its first tokens, as many as the engine keeps now. table: pages that they lie in. state: its row of
    recurrent states, None without any. snapshot_places: where chunks of its prompt end for snapshots of them. runs: of
    image tokens, none if they may be cut. ahead: pieces that may wait for a reader before the sequence is left out of
    steps. pieces: those that wait. error: what ended it other than its last piece. number: of its arrival, given by the
    scheduler. stepped: the last step that it was part of.
    """

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        ending: Ending,
        images: tuple[PromptImage, ...] = (),
        cancellation: Cancellation | None = None,
        ahead: float = AHEAD,
        *,
        whole_images: bool = False,
    ) -> None:
        self.prompt = replace(prompt, images=())
        self.images = images
        self.runs = ImageRuns.of(prompt.visual_index[: None if whole_images else 0])
        self.meter = Meter(len(prompt.ids), prompt.image_tokens)
        self.cancellation = cancellation or Cancellation()
        self.deadline = ending.deadline
        self.ahead = ahead
        self.listener: Listener | None = None  # called with those that have a piece more or have ended
        self.pieces: deque[Piece] = deque()
        self.error: MoevlmError | None = None
        self.status: Status = "new"
        self.finished = False  # whether its last piece was made
        self.number = self.stepped = 0
        self.computed = 0
        self.table: PageTable | None = None
        self.state: StateRow | None = None
        self.snapshot_places: tuple[int, ...] = ()
        self.generated: list[int] = []
        self.content = bytearray(
            content_keys(prompt.ids, prompt.visual_index, [(image.tokens, image.digest) for image in images])
        )
        self.features: dict[int, VisualFeatures] = {}  # by the image's place; while its prompt is computed
        self._ends = np.cumsum([image.tokens for image in images], dtype=np.int64)
        self.sampler = Sampler(params, prompt.ids)
        self._ending = ending
        self._size = len(prompt.ids)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.ids)

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens; the last is computed by the next step."""
        return self._size + len(self.generated)

    @property
    def limit(self) -> int:
        """The most tokens that will ever be computed: the last one generated is not."""
        return len(self.prompt.ids) + self._ending.new_tokens - 1

    @property
    def state_row(self) -> int:
        """Its row of recurrent states, 0 without any."""
        return 0 if self.state is None else self.state.row

    def boundary(self, place: int, unit: int) -> int:
        """The last place up to `place` where a step ends that was to end at a multiple of `unit`.

        It ends behind an image, if images are whole and such a multiple lies within one.
        """
        at = place // unit * unit
        run = self.runs.around(at)
        if run is None:
            return at
        start, end = run
        return end if end <= place else self.boundary(start, unit)

    @property
    def decoding(self) -> bool:
        """Whether its next step is one generated token."""
        generated = len(self.generated)
        return generated > 0 and self.computed == self._size + generated - 1

    @property
    def paused(self) -> bool:
        """Whether its reader is so far behind that no more pieces are made.

        Where it has no pages, until half is read: all of its tokens are computed again then, for more than one piece.
        """
        most = self.ahead if self.status == "running" else max(self.ahead / 2, 1)
        return len(self.pieces) >= most

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Tokens of places start to stop, [stop - start] int64."""
        size = len(self.prompt.ids)
        if stop <= size:
            return self.prompt.ids[start:stop]
        later = np.array(self.generated[max(start - size, 0) : stop - size], np.int64)
        return later if start >= size else np.concatenate([self.prompt.ids[start:], later])

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Where these tokens stand on the time, height and width axes, [3, stop - start] int64."""
        size = len(self.prompt.ids)
        if stop <= size:
            return self.prompt.positions[:, start:stop]
        later = self.prompt.next_position + np.arange(max(start - size, 0), stop - size)
        later = np.broadcast_to(later, (3, len(later)))
        return later if start >= size else np.concatenate([self.prompt.positions[:, start:], later], axis=1)

    def visual_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of its own visual features for these tokens, -1 for text: [stop - start] int64."""
        rows = self.prompt.visual_index[start:stop]
        later = stop - start - len(rows)
        return np.concatenate([rows, np.full(later, -1, np.int64)]) if later else rows

    def unencoded(self, start: int, stop: int) -> list[int]:
        """Places in `images` of those whose features these tokens need, and which it does not have yet."""
        rows = self.visual_rows(start, stop)
        rows = rows[rows >= 0]
        if not len(rows):
            return []
        return [i for i in self._images_at(int(rows[0]), int(rows[-1]) + 1) if i not in self.features]

    def features_of(self, begin: int, end: int) -> list[FeatureRows]:
        """Its visual features from row `begin` to row `end`, image by image."""
        found = []
        for i in self._images_at(begin, end):
            first = int(self._ends[i]) - self.images[i].tokens
            part = max(begin - first, 0), min(end - first, self.images[i].tokens)
            found.append(FeatureRows(self.features[i], *part))
        return found

    def _images_at(self, begin: int, end: int) -> range:
        first, last = np.searchsorted(self._ends, (begin, end - 1), side="right")
        return range(int(first), int(last) + 1)

    def accept(self, row: CandidateRow, started: float, token: int | None = None) -> Piece:
        """Choose the next token and say what it adds to the text.

        started: perf_counter() when the step began, whose seconds count as prefill or decode. token: the sampler's
        choice, if it was found together with others'. Raises EngineError for logits that are not usable.
        """
        sampled = self.sampler.choose(row) if token is None else self.sampler.take(token)
        token = sampled.token_id
        phase = self._phase
        self.generated.append(token)
        self.features.clear()
        self.content += token.to_bytes(KEY_BYTES, "little")
        text, reason = self._advance(token)
        self.meter.count_token()
        self.meter.add(phase, perf_counter() - started)
        piece = Piece(text, (token,), (sampled,), reason, self.meter.usage if reason else None)
        self.pieces.append(piece)
        self.finished = reason is not None
        return piece

    def count_seconds(self, started: float) -> None:
        """Count a step after which no token was chosen; see `accept`."""
        self.meter.add(self._phase, perf_counter() - started)

    @property
    def _phase(self) -> Phase:
        return "decode_seconds" if self.generated else "prefill_seconds"

    def _advance(self, token: int) -> tuple[str, FinishReason | None]:
        """Text that one more token makes certain, and why the sequence ends with it, if it does."""
        ends, last = token in self._ending.eos, len(self.generated) == self._ending.new_tokens
        text = self._ending.text
        if text is None:
            return "", "stop" if ends else "length" if last else None
        fresh = "" if ends else text.push(token)
        if ends or (last and text.stopped is None):
            fresh += text.flush()
        if ends or text.stopped is not None:
            return fresh, "stop"
        return fresh, "length" if last else None
