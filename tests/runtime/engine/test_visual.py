"""Which rows of image features a step reads, and that each image's can be kept alone."""

from __future__ import annotations

import numpy as np

from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined, rows_between, step_features


def features(rows: int, first: int = 0) -> HostFeatures:
    """Row i has the value first + i, and on the deepstack's levels 100 and 200 more."""
    values = np.repeat(np.arange(first, first + rows, dtype=np.float32)[:, None], 3, axis=1)
    return HostFeatures(values, np.stack([values + 100, values + 200]))


def test_images_of_one_call_are_split_into_features_with_memory_of_their_own() -> None:
    whole = features(6)
    assert whole.split([6]) == [whole]
    parts = whole.split([1, 3, 2])
    assert [part.rows for part in parts] == [1, 3, 2]
    assert sum(part.nbytes for part in parts) == whole.nbytes == 6 * 3 * 3 * 4
    again = joined([FeatureRows.all_of(part) for part in parts])
    np.testing.assert_array_equal(again.embeds, whole.embeds)
    np.testing.assert_array_equal(again.deepstack, whole.deepstack)
    for part in parts:
        assert part.to_host().embeds.base is None
        assert part.to_host().deepstack.base is None


def test_a_step_names_the_rows_of_each_image_that_its_tokens_stand_for() -> None:
    first, second = [features(4), features(3, 4)], [features(5, 50)]
    parts = [
        (np.array([-1, 2, 3, -1, 4]), lambda begin, end: rows_between(first, begin, end)),
        (np.array([-1, -1]), lambda *_: rows_between([], 0, 0)),
        (np.array([1, 2]), lambda begin, end: rows_between(second, begin, end)),
    ]
    index, visual = step_features(parts)
    assert index.tolist() == [-1, 0, 1, -1, 2, -1, -1, 3, 4]
    assert [(one.start, one.stop) for one in visual] == [(2, 4), (0, 1), (1, 3)]
    values = joined(visual)
    assert values.embeds[:, 0].tolist() == [2, 3, 4, 51, 52]
    assert values.deepstack[1, :, 0].tolist() == [202, 203, 204, 251, 252]


def test_a_step_of_text_reads_none() -> None:
    index, visual = step_features([(np.array([-1, -1]), lambda *_: [])])
    assert (index.tolist(), visual) == ([-1, -1], ())
