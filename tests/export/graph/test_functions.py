"""The ops' ONNX bodies against the numpy spec, in ONNX Runtime and in onnx's reference evaluator."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bench import variants
from moevlm.export.graph import functions
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER, experts_function, router_function
from moevlm.export.graph.op import ONNX_OPSET, node_spec
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import DOMAIN, SCORINGS, ExpertsSpec, RouterSpec, attributes
from moevlm.runtime.core.errors import UnsupportedModelError
from tests.support.runtimes import Array, Run, in_onnxruntime, in_reference_evaluator, runtimes

TOKENS = (0, 1, 5, 33)
# Both sides are float32 (the spec's experts accumulate in float64): relative to the largest value of the output.
TOLERANCE = 2e-6


biases = pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])


def one_node(function: onnx.FunctionProto, spec: RouterSpec | ExpertsSpec) -> onnx.ModelProto:
    """A checked model whose one node calls `function`; its inputs are the function's."""
    ranks = {"bias": 1, "expert_scale": 1, "gate_up": 3, "down": 3}
    values = {
        name: onnx.helper.make_tensor_value_info(
            name,
            onnx.TensorProto.INT32 if name == "expert_index" else onnx.TensorProto.FLOAT,
            [None] * ranks.get(name, 2),
        )
        for name in [*function.input, *function.output]
    }
    node = onnx.helper.make_node(function.name, function.input, function.output, domain=DOMAIN, **attributes(spec))
    inputs, outputs = ([values[name] for name in names] for names in (function.input, function.output))
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "one_node", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def assert_close(got: Array, want: Array) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max(initial=0))


def assert_routes(run: Run, spec: RouterSpec, inputs: dict[str, Array]) -> None:
    index, weight = route(spec=spec, **inputs)
    got_index, got_weight = run(None, inputs)
    assert got_index.dtype == np.int32
    np.testing.assert_array_equal(got_index, index)
    assert_close(got_weight, weight)


ROUTERS = variants.ROUTERS | variants.MODELS


@runtimes
@biases
@pytest.mark.parametrize("name", ROUTERS)
def test_router_body_agrees_with_the_spec(name, has_bias, runtime):
    run = runtime(one_node(router_function(ROUTERS[name], has_bias), ROUTERS[name]))
    for tokens in TOKENS:
        assert_routes(run, ROUTERS[name], variants.router_inputs(tokens, has_bias, seed=tokens))


@pytest.mark.parametrize("name", variants.MODELS)
def test_router_body_weighs_experts_by_factors_of_their_own(name):
    spec = ROUTERS[name]
    run = in_onnxruntime(one_node(router_function(spec, True, True), spec))
    for tokens in TOKENS:
        assert_routes(run, spec, variants.router_inputs(tokens, seed=tokens, has_scale=True))


@pytest.mark.parametrize("experts", [60, 64, 128])
@pytest.mark.parametrize("name", [name for name, spec in ROUTERS.items() if spec.scale == 1])
def test_router_body_agrees_with_the_spec_for_many_experts(name, experts):
    spec = RouterSpec(**{**vars(ROUTERS[name]), "top_k": 8})
    run = in_onnxruntime(one_node(router_function(spec, True), spec))
    assert_routes(run, spec, variants.router_inputs(33, experts=experts, seed=experts))


# The evaluator's TopK sorts unstably from some size on, so there only a few experts keep ONNX's rule for ties.
@pytest.mark.parametrize(
    ("experts", "runtime"),
    [
        (8, in_onnxruntime),
        (60, in_onnxruntime),
        (64, in_onnxruntime),
        (128, in_onnxruntime),
        (8, in_reference_evaluator),
    ],
)
@pytest.mark.parametrize("groups", variants.GROUPS)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_ties_go_to_the_lower_index(scoring, groups, experts, runtime):
    n_group, topk_group, group_score = variants.GROUPS[groups]
    k = 3 if experts == 8 else 8
    spec = RouterSpec(k, scoring, n_group=n_group, topk_group=topk_group, group_score=group_score)
    run = runtime(one_node(router_function(spec, False), spec))
    few_values = np.random.RandomState(1).randint(0, 3, (33, experts)).astype(np.float32)
    assert_routes(run, spec, {"logits": np.concatenate([few_values, np.zeros((1, experts), np.float32)])})


@runtimes
@biases
@pytest.mark.parametrize("name", variants.BLOCKS)
def test_experts_body_agrees_with_the_spec(name, has_bias, runtime):
    spec = variants.BLOCKS[name]
    run = runtime(one_node(experts_function(spec, has_bias), spec))
    weights = variants.expert_weights(spec, has_bias)
    for tokens in TOKENS:
        index, weight = route(
            variants.router_inputs(tokens, False, seed=tokens)["logits"], variants.MODELS["glm4v_moe"]
        )
        x = variants.hidden_states(tokens, seed=tokens)
        got = run(None, {"x": x, "expert_index": index, "expert_weight": weight, **weights})[0]
        assert_close(got, reference_experts(x, index, weight, spec=spec, **weights))


@pytest.mark.parametrize(("experts", "top_k", "hidden", "inner"), [(64, 8, 48, 24), (3, 3, 5, 7), (5, 1, 1, 1)])
def test_experts_body_agrees_with_the_spec_in_other_shapes(experts, top_k, hidden, inner):
    spec = ExpertsSpec()
    run = in_onnxruntime(one_node(experts_function(spec, True), spec))
    weights = variants.expert_weights(spec, True, hidden, inner, experts)
    logits = variants.router_inputs(33, False, experts)["logits"]
    index, weight = route(logits, RouterSpec(top_k))
    x = variants.hidden_states(33, hidden)
    got = run(None, {"x": x, "expert_index": index, "expert_weight": weight, **weights})[0]
    assert_close(got, reference_experts(x, index, weight, spec=spec, **weights))


@runtimes
def test_weights_of_experts_that_no_token_chose_are_never_read(runtime):
    spec = ExpertsSpec()
    run = runtime(one_node(experts_function(spec, True), spec))
    weights = variants.expert_weights(spec, True)
    index = np.array([[1, 4], [4, 6]], np.int32)
    for array in weights.values():
        array[[0, 2, 3, 5, 7]] = np.nan
    inputs = {"x": variants.hidden_states(2), "expert_index": index, "expert_weight": np.full((2, 2), 0.5, np.float32)}
    assert np.isfinite(run(None, inputs | weights)[0]).all()
    weights["down"][6] = np.nan  # and a chosen expert's weights are
    assert np.isnan(run(None, inputs | weights)[0]).any(axis=1).tolist() == [False, True]


# Functions of a whole model.


def routers(*nodes: tuple[RouterSpec, tuple[str, ...]]) -> ir.Model:
    """A model of MoERouter nodes over the same logits, each with those of the optional inputs that are named."""
    shapes = {"logits": ["T", 8], "bias": [8], "expert_scale": [8]}
    given = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in shapes.items()
    }
    made = [
        ir.node(
            ROUTER,
            [value if name in ("logits", *names) else None for name, value in given.items()],
            attributes(spec),
            domain=DOMAIN,
            num_outputs=2,
        )
        for spec, names in nodes
    ]
    for i, node in enumerate(made):
        for value, name, kind in zip(node.outputs, ("index", "weight"), ("INT32", "FLOAT"), strict=True):
            value.name, value.type = f"{name}_{i}", ir.TensorType(ir.DataType[kind])
            value.shape = ir.Shape(["T", "k"])
    outputs = [value for node in made for value in node.outputs]
    graph = ir.Graph(list(given.values()), outputs, nodes=made, opset_imports={"": ONNX_OPSET}, name="routers")
    return ir.Model(graph, ir_version=10)


def test_each_node_gets_the_body_of_its_own_spec_and_inputs():
    sigmoid, softmax = variants.MODELS["deepseek_v3"], variants.MODELS["qwen3_vl_moe"]
    nodes = [(softmax, ()), (sigmoid, ("bias",)), (softmax, ()), (sigmoid, ()), (softmax, ("expert_scale",))]
    nodes.append((sigmoid, ("bias", "expert_scale")))
    model = routers(*nodes)
    functions.add_functions(model)
    assert sorted(model.functions) == [(DOMAIN, ROUTER, overload) for overload in ("", "2", "3", "4", "5")]
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    inputs = variants.router_inputs(5, has_scale=True)
    outputs = in_onnxruntime(proto)(None, inputs)
    for (spec, names), index, weight in zip(nodes, outputs[0::2], outputs[1::2], strict=True):
        want_index, want_weight = route(spec=spec, **{name: inputs[name] for name in ("logits", *names)})
        np.testing.assert_array_equal(index, want_index)
        assert_close(weight, want_weight)


def test_bodies_without_a_node_are_dropped():
    model = routers((RouterSpec(2), ()), (RouterSpec(3), ()))
    functions.add_functions(model)
    assert len(model.functions) == 2
    for value in model.graph.outputs[:2]:
        model.graph.outputs.remove(value)
    model.graph.remove(model.graph.node(0), safe=True)
    functions.add_functions(model)
    assert list(model.functions) == [(DOMAIN, ROUTER, "")]
    assert model.graph.node(0).overload == ""


def test_specs_survive_as_node_attributes():
    spec = RouterSpec(2, "sigmoid", False, 1e-20, 2.446, 4, 2, "top2_sum")
    assert node_spec(routers((spec, ())).graph.node(0)) == spec
    block = ExpertsSpec("swiglu_clamped", True, "input", 1.702, float("inf"))
    x = ir.Value(name="x")
    assert node_spec(ir.node(EXPERTS, [x] * 5, attributes(block), domain=DOMAIN)) == block


@pytest.mark.parametrize(
    ("op", "inputs", "message"),
    [("MoEExperts", 6, "both biases, or none"), ("MoEShuffle", 1, "no op moevlm::MoEShuffle")],
)
def test_node_that_has_no_body_is_refused_by_name(op, inputs, message):
    x = ir.Value(name="x")
    node = ir.node(op, [x] * inputs, domain=DOMAIN, name="layers.3.moe")
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.3\.moe: .*{message}"):
        functions.add_functions(model)
