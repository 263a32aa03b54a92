"""Images in pieces through the engine: cut by chunks, kept by what each piece shows, counted with their separators."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.core.manifest import ImageMarks
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.step import EngineLimits
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampling import SamplingParams
from tests.runtime.request.test_image_layout import COUNTED, noise, tiled
from tests.support.paged_engine import IMAGE, MODEL, PagedEngine, alone

GREEDY = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
MARKS = ImageMarks(
    begin=(10,), end=(11,), row_break=(15,), tile_break=(12,), tile_row_end=(13,), overview=(14,)
)  # every kind at once
PAGED = msgspec.structs.replace(MODEL, image_marks=MARKS, ropes=(COUNTED,))
LIMITS = EngineLimits(4, 64, 64, MODEL.context, 8)


def runtime_of(engine: PagedEngine, chunk_tokens: int = 64) -> Runtime:
    return Runtime(PAGED, None, None, engine, tiled(), chunk_tokens=chunk_tokens)


def prompt_of(image: Image.Image, *behind: int) -> Prompt:
    layout = tiled().layout(image)
    return Prompt.from_ids([5, *layout.ids(PAGED), *behind], layout.grids, PAGED, tiled().fit(image))


def expected(prompt: Prompt) -> list[int]:
    """All pieces encoded at once, all tokens computed at once."""
    values = prompt.ids.copy()
    features = PagedEngine(LIMITS).encode(tiled().pack(prompt.images)[0])
    values[values == IMAGE] = features.embeds[:, 0].astype(np.int64)
    return alone(tuple(values.tolist()), GREEDY.max_new_tokens, GREEDY)


def answer(runtime: Runtime, prompt: Prompt) -> tuple[list[int], int, int]:
    pieces = list(runtime.generate(prompt, params=GREEDY))
    usage = pieces[-1].usage
    assert usage is not None
    return [token for piece in pieces for token in piece.token_ids], usage.prompt_tokens, usage.image_tokens


@pytest.mark.parametrize("chunk_tokens", [3, 17, 64])
def test_tiles_cut_by_steps_answer_as_the_whole_and_are_counted(chunk_tokens: int) -> None:
    engine = PagedEngine(LIMITS)
    prompt = prompt_of(noise(96, 64), 6, 7)
    # 5, begin, 6 tiles and an overview of 16 tokens with 3 row breaks each, 4 + 2 + 1 separators, end, 6, 7.
    assert (len(prompt.ids), prompt.image_tokens) == (2 + 7 * (16 + 3) + 7 + 1 + 2, 7 * 16)
    tokens, prompt_tokens, image_tokens = answer(runtime_of(engine, chunk_tokens), prompt)
    assert tokens == expected(prompt)
    assert (prompt_tokens, image_tokens) == (len(prompt.ids), 112)
    assert max(step.tokens for step in engine.steps) <= chunk_tokens


def test_a_known_tiled_image_is_neither_encoded_nor_computed_again() -> None:
    engine = PagedEngine(LIMITS)
    runtime = runtime_of(engine)
    image = noise(96, 64)
    first, second = prompt_of(image, 6, 7), prompt_of(image, 8)
    assert answer(runtime, first)[0] == expected(first)
    encoded, computed = len(engine.encoded), len(engine.steps)
    assert answer(runtime, second)[0] == expected(second)
    assert len(engine.encoded) == encoded
    # Of 144 tokens those of the last pages, and the answer's.
    assert sum(step.tokens for step in engine.steps[computed:]) < 3 * LIMITS.page_size


def test_an_image_that_shares_some_tiles_is_encoded_but_for_these() -> None:
    engine = PagedEngine(LIMITS)
    runtime = runtime_of(engine)
    image = noise(96, 64)
    other = image.copy()
    other.paste(noise(32, 32, seed=1), (64, 32))  # the last tile, so the overview, too
    assert answer(runtime, prompt_of(image, 6))[0] == expected(prompt_of(image, 6))
    before = sum(len(inputs.image_start) - 1 for inputs in engine.encoded)
    assert answer(runtime, prompt_of(other, 6))[0] == expected(prompt_of(other, 6))
    assert (before, sum(len(inputs.image_start) - 1 for inputs in engine.encoded)) == (7, 9)
