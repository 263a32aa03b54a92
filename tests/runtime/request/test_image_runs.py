"""Runs of image tokens, against their definition token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moevlm.runtime.request.image_runs import ImageRuns


@given(images=st.lists(st.booleans(), min_size=1, max_size=40), data=st.data())
def test_runs_say_what_a_token_sees_and_which_cut_splits_an_image(images: list[bool], data: st.DataObject) -> None:
    index = np.where(images, np.cumsum(images) - 1, -1)
    runs = ImageRuns.of(index)
    ends = []
    for place, image in enumerate(images):
        end = place + 1
        while image and end < len(images) and images[end]:
            end += 1
        ends.append(end)
    start = data.draw(st.integers(0, len(images)))
    stop = data.draw(st.integers(start, len(images) + 3))
    generated = [len(images) + n + 1 for n in range(3)]  # tokens behind the prompt are text
    found = runs.visible_end(start, stop)
    assert found.dtype == np.int32
    assert found.tolist() == [*ends, *generated][start:stop]
    for place in range(len(images) + 2):
        splits = 0 < place < len(images) and images[place - 1] and images[place]
        run = runs.around(place)
        assert (run is not None) == splits
        if run is not None:
            assert run[0] < place < run[1] == ends[place - 1]
            assert all(images[run[0] : run[1]])
            assert run[0] == 0 or not images[run[0] - 1]
