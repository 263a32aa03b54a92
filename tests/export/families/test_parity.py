"""Every family against transformers, on tiny models that vary what it varies: see `tests.support.families`.

Prompts with none to three images: in one pass, in chunks beside other sequences' single tokens, each alone; the experts
of every token; and greedily 32 tokens.
"""

from pathlib import Path

import numpy as np
import pytest

from moevlm.export.build import build
from moevlm.export.parity.debug_engine import DebugEngine
from moevlm.export.parity.tolerances import EXACT
from moevlm.runtime.bundle.reader import Bundle
from tests.support.families import TINY
from tests.support.parity import GREEDY_TOKENS, held
from tests.support.tiny import TinyCheckpoint

MODELS = [(family, name) for family in TINY for name in TINY[family].configurations]


@pytest.mark.parametrize("family", TINY)
def test_four_configurations_at_least(family: str) -> None:
    assert len(TINY[family].configurations) >= 4


@pytest.mark.parametrize(("family", "name"), MODELS, ids=[f"{family}: {name}" for family, name in MODELS])
def test_canonical_pytorch_and_its_graph_are_transformers(family: str, name: str, tmp_path: Path) -> None:
    tiny = TinyCheckpoint(family, **TINY[family].configurations[name])
    checkpoint = tiny.save(tmp_path / "checkpoint")
    with held(checkpoint, tiny.seed) as model:
        assert model.expected.tokens.shape == (GREEDY_TOKENS, 4)
        chosen = model.ordinary[model.expected.decode[..., model.ordinary].argmax(-1)]
        np.testing.assert_array_equal(chosen[:-1], model.expected.tokens[1:])
        found = model.of_pytorch()
        bundle = Bundle.open(build(checkpoint, tmp_path / "bundle", ["reference"]).directory)
        engine = DebugEngine(bundle, "reference", model.expected.config)
        found += model.of(engine, "reference")
        engine.close()
    assert [check for check in found if not check.passed] == []
    routing = {"routings that differ"} if model.model.config.moe else set()
    assert {check.quantity for check in found} >= {"decode logits", "first choices that differ", *routing}
    assert max(check.value for check in found) < EXACT.logits / 2  # a slow drift towards the limit shows here first
