"""The systems that bench.delta_bench compares compute the same."""

import numpy as np
import pytest

from bench.delta_rules import RULES, Work
from moevlm.plugins.ops.spec import GatedDeltaSpec

SPEC = GatedDeltaSpec(key_heads=2, value_heads=4, key_dim=16, value_dim=32, kernel=4)


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (3, 1), (1, 40)], ids=["decode", "batch", "prompt"])
def test_systems_agree_from_run_to_run(sequences: int, tokens: int) -> None:
    first, *others = (rule(Work(SPEC, sequences, tokens, layers=2), threads=1) for rule in RULES)
    for _ in range(3):  # each continues with the states that the last one left
        first.run()
        for other in others:
            other.run()
            np.testing.assert_allclose(other.y(), first.y(), rtol=0, atol=1e-5 * np.abs(first.y()).max())
