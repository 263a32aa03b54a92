"""The router kernel, interpreted, against the numpy spec."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.variants import EXPERTS, MODELS, ROUTERS, router_inputs
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import SCORINGS, RouterSpec
from tests.plugins.gpu.interpreter import Interpreter

SPECS = ROUTERS | MODELS


def agrees(interpreter: Interpreter, spec: RouterSpec, inputs: dict[str, np.ndarray]) -> None:
    op = RouterOp(spec, inputs["logits"].shape[1], "bias" in inputs, "expert_scale" in inputs)
    index, weight = interpreter.run(op.draft(80), inputs)
    expected_index, expected_weight = route(spec=spec, **inputs)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(weight, expected_weight, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", SPECS)
def test_every_variant_agrees_with_the_spec(triton_interpreter: Interpreter, name: str, has_bias: bool) -> None:
    agrees(triton_interpreter, SPECS[name], router_inputs(5, has_bias, seed=np.random.randint(1 << 30)))


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", MODELS)
def test_experts_have_factors_of_their_own(triton_interpreter: Interpreter, name: str, has_bias: bool) -> None:
    inputs = router_inputs(5, has_bias, seed=np.random.randint(1 << 30), has_scale=True)
    agrees(triton_interpreter, MODELS[name], inputs)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("groups", [1, 4])
def test_ties_go_to_the_lower_index(triton_interpreter: Interpreter, scoring: str, groups: int) -> None:
    rng = np.random.default_rng()
    logits = rng.integers(0, 2, (40, EXPERTS)).astype(np.float32)
    group_score = "max" if groups == 1 else "top2_sum"
    agrees(
        triton_interpreter,
        RouterSpec(3, scoring, True, 0.0, 1.0, groups, min(groups, 2), group_score),
        {"logits": logits},
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_logits_that_are_not_numbers_still_name_experts_and_touch_no_other_token(
    triton_interpreter: Interpreter, scoring: str, groups: int
) -> None:
    """A kernel that reads weights by an index must never be given one that is none."""
    spec = RouterSpec(2, scoring, True, 0.0, 1.0, groups, min(groups, 2))
    inputs = router_inputs(5, seed=np.random.randint(1 << 30))
    wrong = inputs["logits"].copy()
    wrong[1], wrong[2, 3], wrong[3, :2] = np.nan, np.nan, np.inf
    made = RouterOp(spec, EXPERTS, True).draft(80)
    index, weight = triton_interpreter.run(made, inputs | {"logits": wrong})
    assert ((index >= 0) & (index < EXPERTS)).all()
    expected_index, expected_weight = route(spec=spec, **inputs)
    np.testing.assert_array_equal(index[[0, 4]], expected_index[[0, 4]])
    np.testing.assert_allclose(weight[[0, 4]], expected_weight[[0, 4]], rtol=2e-6, atol=1e-7)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_number_of_experts_and_groups(triton_interpreter: Interpreter, data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 70))
    topk_group = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(17, topk_group * size)))
    scoring = data.draw(st.sampled_from(SCORINGS))
    score = data.draw(st.sampled_from(("max", "top2_sum")))
    spec = RouterSpec(top_k, scoring, data.draw(st.booleans()), 1e-20, 2.5, groups, topk_group, score)
    seed = data.draw(st.integers(0, 1 << 30))
    agrees(
        triton_interpreter,
        spec,
        router_inputs(3, data.draw(st.booleans()), groups * size, seed, data.draw(st.booleans())),
    )
