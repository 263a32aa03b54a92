"""com.microsoft::MoE in the place of the moevlm ops, in ONNX Runtime, against the numpy spec."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bench import variants
from moevlm.export.backends.ort.passes.lower_moe import LowerMoE
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER
from moevlm.export.graph.weights import initializer
from moevlm.export.passes.base import run
from moevlm.plugins.ops.experts import experts
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import DOMAIN, SCORINGS, RouterSpec
from moevlm.runtime.core.errors import BuildError
from tests.support.moe_cases import SILU, Case, assert_close, ops, session, value

QWEN, DEEPSEEK_V3, LLAMA4 = (variants.MODELS[name] for name in ("qwen3_vl_moe", "deepseek_v3", "llama4"))
biases = pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])


def lowered(case: Case, tap: bool = False) -> ir.Model:
    model = case.model(tap)
    assert run([LowerMoE()], model) == {"LowerMoE": 1}
    onnx.checker.check_model(ir.to_proto(model))
    return model


ROUTERS = variants.ROUTERS | variants.MODELS
# Without a bias these go straight in: no group is masked, and no epsilon shows.
DIRECT = {
    *(
        name
        for name in variants.ROUTERS
        if name.endswith("flat") and not name.startswith("sigmoid") and "-eps-" not in name
    ),
    "qwen3_vl_moe",
    "gpt_oss",
}


@biases
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_lowered(name, has_bias):
    case = Case(ROUTERS[name], router_bias=has_bias)
    model = lowered(case)
    direct = name in DIRECT and not has_bias
    assert "MoE" in ops(model)
    assert EXPERTS not in ops(model)
    assert (ROUTER in ops(model)) != direct
    case.check(model)


KEPT = [name for name in variants.BLOCKS if name.startswith("gelu_tanh-gated")]


@biases
@pytest.mark.parametrize("router", [QWEN, DEEPSEEK_V3, LLAMA4], ids=["qwen3_vl_moe", "deepseek_v3", "llama4"])
@pytest.mark.parametrize("name", [name for name in variants.BLOCKS if name not in KEPT])
def test_every_block_that_the_kernel_knows_is_lowered(name, router, has_bias):
    case = Case(router, variants.BLOCKS[name], expert_biases=has_bias)
    model = lowered(case)
    assert EXPERTS not in ops(model)
    case.check(model)


@biases
@pytest.mark.parametrize("name", KEPT)
def test_gated_gelu_keeps_its_body(name, has_bias):
    case = Case(QWEN, variants.BLOCKS[name], expert_biases=has_bias)
    model = case.model()
    assert run([LowerMoE()], model) == {"LowerMoE": 0}
    assert ops(model) == [ROUTER, EXPERTS]
    case.check(model)


def test_factors_for_experts_keep_the_body():
    case = Case(QWEN, router_scale=True)
    assert (case.expert_scale < 0).any()
    model = case.model()
    assert run([LowerMoE()], model) == {"LowerMoE": 0}
    assert ops(model) == [ROUTER, EXPERTS]
    case.check(model)


@pytest.mark.parametrize("name", [name for name in variants.ROUTERS if name.endswith("x2.5-top2_sum")])
def test_weight_on_the_input_of_several_experts(name):
    case = Case(ROUTERS[name], replace(SILU, weight_on="input"), router_bias=True, expert_biases=True)
    case.check(lowered(case))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_sixty_four_experts(scoring):
    case = Case(RouterSpec(8, scoring), experts=64)
    case.check(lowered(case))


@pytest.mark.parametrize(("epsilon", "direct"), [(1e-20, True), (1e-9, True), (1e-6, False), (0.5, False)])
def test_an_epsilon_that_shows_in_float32_is_not_dropped(epsilon, direct):
    case = Case(RouterSpec(2, epsilon=epsilon))
    model = lowered(case)
    assert (ROUTER not in ops(model)) == direct
    case.check(model)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "deepseek_v3"])
def test_a_tapped_router_stays_and_shows_the_routing_that_was_used(name):
    case = Case(variants.MODELS[name], router_bias=name == "deepseek_v3")
    model = lowered(case, tap=True)
    # Equal logits everywhere: a tap beside a kernel that routes for itself would show the other end of the tie.
    inputs = case.inputs(33)
    inputs["logits"][7] = 0
    y, index, weight = session(model).run(None, inputs)
    want_index, want_weight = route(inputs["logits"], case.router, case.bias)
    np.testing.assert_array_equal(index, want_index)
    assert_close(weight, want_weight)
    assert_close(y, case.want(inputs))


@pytest.mark.parametrize(
    ("router", "logits"),
    [
        (RouterSpec(2, "softmax_after_topk", scale=2.0), [200.0, -200.0, *[-300.0] * 6]),
        (RouterSpec(2, "sigmoid", renormalize=False), [90.0, -200.0, *[-300.0] * 6]),
        (RouterSpec(2, "sigmoid", renormalize=False), [-200.0] * 8),
        (RouterSpec(2, "sigmoid", epsilon=1e-20), [-200.0] * 8),
    ],
    ids=["one of two", "one of two sigmoids", "all", "all, divided by epsilon"],
)
def test_a_weight_of_zero_counts_nothing(router, logits):
    case = Case(router)
    inputs = {"logits": np.array([logits], np.float32), "x": variants.hidden_states(1)}
    index, weight = route(inputs["logits"], router)
    assert (weight == 0).any()
    # The chosen experts are still the chosen ones: no other's weights are read in their place.
    for array in case.weights.values():
        array[np.setdiff1d(np.arange(8), index)] = np.nan
    assert_close(session(lowered(case)).run(None, inputs)[0], case.want(inputs))


def test_equal_logits_go_to_the_higher_index_in_the_direct_form():
    case = Case(RouterSpec(1), experts=4)
    inputs = {"logits": np.zeros((1, 4), np.float32), "x": variants.hidden_states(1)}
    last = experts(inputs["x"], np.array([[3]]), np.ones((1, 1)), spec=SILU, **case.weights)
    assert_close(session(lowered(case)).run(None, inputs)[0], last)


@pytest.mark.parametrize("router", [QWEN, DEEPSEEK_V3], ids=["direct", "routed"])
def test_weights_of_experts_that_no_token_chose_are_never_read(router):
    case = Case(router, expert_biases=True)
    inputs = case.inputs(1)
    index, _ = route(inputs["logits"], router)
    for array in case.weights.values():
        array[np.setdiff1d(np.arange(8), index)] = np.nan
    assert np.isfinite(session(lowered(case)).run(None, inputs)[0]).all()


class Unread:
    """A weight that must not be read while a pass runs."""

    shape, dtype = (8, 12, 12), np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError(f"read [{start}:{stop}]")


def test_interleaving_is_lazy_and_replaces_the_initializer():
    case = Case(QWEN, expert_biases=True)
    model = case.model()
    old = model.graph.initializers["gate_up"]
    unread = initializer("gate_up", Unread())
    old.const_value = unread.const_value
    run([LowerMoE()], model)
    assert sorted(model.graph.initializers) == ["down", "down_bias", "gate_up.interleaved", "gate_up_bias.interleaved"]
    with pytest.raises(AssertionError, match="read"):
        model.graph.initializers["gate_up.interleaved"].const_value.numpy()
    bias = model.graph.initializers["gate_up_bias.interleaved"].const_value.numpy()
    gate, up = np.split(case.weights["gate_up_bias"], 2, axis=1)
    np.testing.assert_array_equal(bias[:, 0::2], gate)
    np.testing.assert_array_equal(bias[:, 1::2], up)


def test_nothing_of_moevlm_is_left_by_the_direct_form_and_a_second_run_does_nothing():
    model = Case(QWEN).model()
    assert run([LowerMoE(), LowerMoE()], model) == {"LowerMoE": 1}
    assert ops(model) == ["MoE"]
    assert not model.functions
    assert DOMAIN not in model.graph.opset_imports


def test_experts_that_a_router_alone_does_not_choose_keep_their_body():
    model = Case(QWEN).model()
    index = value("routed_elsewhere", ["T", 2], ir.DataType.INT32)
    model.graph.inputs.append(index)
    model.graph.node("layers.0.moe").replace_input_with(1, index)
    assert LowerMoE().apply(model) == 0
    assert ops(model).count("MoEExperts") == 1


def test_expert_weights_that_are_not_initializers_are_refused_by_name():
    model = Case(QWEN).model()
    gate_up = value("gate_up_in", [8, 12, 12])
    model.graph.inputs.append(gate_up)
    model.graph.node("layers.0.moe").replace_input_with(3, gate_up)
    with pytest.raises(BuildError, match="gate_up_in"):
        LowerMoE().apply(model)
