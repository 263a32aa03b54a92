"""Steps that say something impossible about recurrent states or images are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import QueryScaleMetadata
from moevlm.runtime.engine.protocol import check_step
from moevlm.runtime.engine.step import EngineLimits, Step
from tests.support.paged_engine import MODEL, SEEING_MODEL

LIMITS = EngineLimits(4, 100, 100, 1000, 4, packed=True)
# Two sequences: tokens 3 to 7 of one, and 0 to 2 of another.
STEP = Step(
    input_ids=np.zeros(6, np.int64),
    visual_index=np.full(6, -1, np.int64),
    rope={},
    query_start=np.array([0, 4, 6], np.int32),
    context_len=np.array([3, 0], np.int32),
    page_table=np.array([[1, 2], [3, 0]], np.int32),
    state_row=np.array([1, 2], np.int32),
    logits_index=np.array([3, 5], np.int32),
    cleared=(2,),
    row_copies=((3, 1), (3, 4)),
    visible_end=np.array([7, 7, 6, 7, 1, 2], np.int32),
)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"row_copies": ((0, 1),)}, "row_copies has 0 (allowed: 1 to 4)"),
    ({"row_copies": ((3, 5),)}, "row_copies has 5 (allowed: 1 to 4)"),
    (
        {"row_copies": ((3, 1), (4, 1))},
        "row_copies has the target 1 (allowed: neither a source nor cleared, and once)",
    ),
    (
        {"row_copies": ((3, 1), (1, 4))},
        "row_copies has the target 1 (allowed: neither a source nor cleared, and once)",
    ),
    (
        {"row_copies": ((3, 2),)},
        "row_copies has the target 2 (allowed: neither a source nor cleared, and once)",
    ),
    ({"row_copies": ((2, 1),)}, "row_copies has the source 2 (allowed: a row that is not cleared)"),
    ({"visible_end": None}, "visible_end has the shape None (allowed: [6])"),
    ({"visible_end": np.zeros(5, np.int32)}, "visible_end has the shape [5] (allowed: [6])"),
    ({"visible_end": np.array([4, 4, 6, 7, 1, 2], np.int32)}, "visible_end has 4 (allowed: 5 to 7)"),
    ({"visible_end": np.array([4, 5, 6, 8, 1, 2], np.int32)}, "visible_end has 8 (allowed: 7 to 7)"),
    ({"visible_end": np.array([4, 5, 6, 7, 1, 7], np.int32)}, "visible_end has 7 (allowed: 2 to 2)"),
]


@pytest.mark.parametrize(
    ("change", "words"), BAD, ids=[f"{next(iter(change))}-{n}" for n, (change, _) in enumerate(BAD)]
)
def test_a_step_that_contradicts_itself_is_refused(change: dict[str, Any], words: str) -> None:
    check_step(STEP, (), LIMITS, SEEING_MODEL, 4, 5)
    with pytest.raises(EngineError) as raised:
        check_step(replace(STEP, **change), (), LIMITS, SEEING_MODEL, 4, 5)
    assert str(raised.value) == words


@pytest.mark.parametrize(("scale", "shape"), [(None, "None"), (np.ones(5, np.float32), "[5]")], ids=["none", "too-few"])
def test_factors_of_queries_are_as_many_as_tokens(scale: np.ndarray | None, shape: str) -> None:
    model = msgspec.structs.replace(MODEL, query_scale=QueryScaleMetadata(beta=0.1, original=4))
    check_step(replace(STEP, query_scale=np.ones(6, np.float32)), (), LIMITS, model, 4, 5)
    with pytest.raises(EngineError) as raised:
        check_step(replace(STEP, query_scale=scale), (), LIMITS, model, 4, 5)
    assert str(raised.value) == f"query_scale has the shape {shape} (allowed: [6])"


def test_a_model_without_such_layers_needs_neither() -> None:
    check_step(replace(STEP, visible_end=None, row_copies=(), cleared=()), (), LIMITS, MODEL, 4, 0)
