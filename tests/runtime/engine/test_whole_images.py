"""Models whose image tokens see each other: an image is never cut, whatever the traffic, and answers stay the same."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.engine.prompt_image import PromptImage
from moevlm.runtime.engine.sequence import Ending, Sequence
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.house import House, parts_of
from tests.support.paged_engine import EOS, IMAGE, alone, seen

Content = tuple[int | tuple[int, int], ...]  # text tokens, and images: which, and how many tokens it has


def image_of(which: int, tokens: int) -> PromptImage:
    pixels = (1000 * which + np.arange(tokens)).astype(np.float32).tobytes()
    return PromptImage(blake2b(pixels, digest_size=16).digest(), tokens, "F", (tokens, 1), pixels)


def prompt_of(content: Content) -> Prompt:
    """Positions count tokens."""
    ids = [token for part in content for token in ([part] if isinstance(part, int) else [IMAGE] * part[1])]
    is_image = np.array(ids) == IMAGE
    index = np.where(is_image, np.cumsum(is_image) - 1, -1)
    return Prompt(np.array(ids), index, np.tile(np.arange(len(ids)), (3, 1)), len(ids))


def sequence_of(content: Content, new_tokens: int = 4) -> Sequence:
    images = tuple(image_of(*part) for part in content if not isinstance(part, int))
    ending = Ending(new_tokens, frozenset({EOS}))
    return Sequence(prompt_of(content), SamplingParams(), ending, images, ahead=1e9, whole_images=True)


def answer_of(content: Content, new_tokens: int = 4) -> list[int]:
    values: list[int] = []
    for part in content:
        if isinstance(part, int):
            values.append(part)
        else:
            which, tokens = part
            values += seen([1000 * which + n for n in range(tokens)], list(range(tokens, 0, -1)))
    return alone(tuple(values), new_tokens, SamplingParams())


def said(sequence: Sequence) -> list[int]:
    return [token for piece in sequence.pieces for token in piece.token_ids]


# An image stands between text, as processors put it.
IMAGES = st.tuples(st.integers(1, 3), st.integers(1, 30))
TEXT = st.lists(st.integers(4, 9), min_size=1, max_size=12)
CONTENTS = st.lists(st.tuples(TEXT, st.none() | IMAGES), min_size=1, max_size=5).map(
    lambda parts: (*(one for text, image in parts for one in (*text, *([image] if image else []))), 9)
)


def check_cuts(house: House) -> int:
    """One step. Returns how many sequences took part."""
    parts = house.schedule()
    for part in parts:
        for place in (part.start, part.stop):
            assert part.sequence.runs.around(place) is None, "an image is cut"
    if parts:
        house.finish(parts)
    return len(parts)


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(CONTENTS, min_size=1, max_size=8),
    packed=st.booleans(),
    pages=st.integers(50, 120),
    page=st.sampled_from([1, 4, 16]),
    chunk=st.sampled_from([1, 3, 20, 64]),
    room=st.integers(0, 20),
    sequences=st.integers(1, 5),
    rows=st.sampled_from([0, 0, 4]),
    data=st.data(),
)
def test_random_traffic_cuts_no_image_and_changes_no_answer(
    contents: list[Content],
    packed: bool,
    pages: int,
    page: int,
    chunk: int,
    room: int,
    sequences: int,
    rows: int,
    data: st.DataObject,
) -> None:
    # As few tokens in a step as there may be, a few more, or a limit by images.
    most = 30 + room + (sequences - 1 if packed else chunk)
    house = House(
        {1: 4 * pages, 4: pages, 16: 16}[page],
        packed=packed,
        page=page,
        chunk=chunk,
        max_tokens=most,
        max_visual=data.draw(st.sampled_from([None, 30])) if packed else None,
        sequences=sequences,
        rows=rows,
        whole_images=True,
    )
    asked = []
    for content in contents:
        asked.append((sequence_of(content), content))
        house.scheduler.add(asked[-1][0])
        for _ in range(data.draw(st.integers(0, 6))):
            check_cuts(house)
        if data.draw(st.integers(0, 9)) == 0:
            house.scheduler.abort(house.schedule())
    steps = 0
    while house.scheduler.running or house.scheduler.waiting:
        steps += 1
        assert check_cuts(house) > 0, "nothing goes on"
        assert steps < 3000, "some sequence starves"
    house.check_pages([sequence for sequence, _ in asked])
    for sequence, content in asked:
        assert said(sequence) == answer_of(content)


def test_a_chunk_ends_behind_an_image_or_before_it_where_a_step_has_no_room():
    content: Content = (*[5] * 10, (1, 12), *[6] * 10, (2, 30), 7, (1, 12), 8)
    wide, narrow = (
        House(pages=100, chunk=16, max_tokens=tokens, sequences=1, whole_images=True) for tokens in (64, 32)
    )
    assert parts_of(wide, sequence_of(content)) == [(0, 22), (22, 62), (62, 76)]
    assert parts_of(narrow, sequence_of(content)) == [(0, 22), (22, 32), (32, 62), (62, 76)]


def test_an_image_is_read_beside_decodes_whatever_a_chunk_takes_there():
    house = House(pages=100, whole_images=True)
    house.scheduler.add(running := sequence_of((5, 6, 7), 60))
    house.step()
    house.scheduler.add(image := sequence_of((*[5] * 20, (1, 90), 7)))
    assert [(part.sequence, part.stop - part.start) for part in house.schedule()] == [(running, 1), (image, 110)]


def test_a_beginning_that_ends_within_an_image_is_computed_from_the_image_on():
    house = House(pages=14, page=4, whole_images=True)
    content: Content = (*[5] * 6, (1, 20), *[6] * 6)
    assert parts_of(house, sequence_of(content)) == [(0, 32)]
    parts_of(house, sequence_of((*[7] * 26, 8)))  # takes pages, the last ones of the first prompt before others
    known, _, tokens = house.pool.find(bytes(sequence_of(content).content), 31)
    assert 6 < tokens < 26
    again = sequence_of(content)
    assert parts_of(house, again) == [(6, 32)]
    assert said(again) == answer_of(content)
    assert known


def test_another_image_of_the_same_size_is_not_taken_for_the_first():
    house = House(page=4, whole_images=True)
    for which in (1, 2, 1):
        content: Content = (*[5] * 6, (which, 20), *[6] * 6)
        house.scheduler.add(sequence := sequence_of(content))
        house.drain()
        assert said(sequence) == answer_of(content)


def test_an_image_that_no_step_holds_is_refused_by_name():
    house = House(max_tokens=40, sequences=8, whole_images=True)
    with pytest.raises(RequestError) as raised:
        house.scheduler.add(sequence_of((5, (1, 34), 6)))
    assert str(raised.value) == (
        "an image has 34 tokens, a step of the engine takes up to 33 of one (max_image_tokens makes images smaller)"
    )
    house.scheduler.add(sequence_of((5, (1, 33), 6)))
    with pytest.raises(RequestError, match=r"takes up to 20 of one"):
        House(max_tokens=40, max_visual=20, whole_images=True).scheduler.add(sequence_of((5, (1, 21), 6)))
