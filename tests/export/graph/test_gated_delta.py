"""The body of GatedDelta against the numpy spec, in ONNX Runtime and in onnx's reference evaluator."""

import numpy as np
import onnx
import pytest
import torch

from moevlm.export.config import DecoderConfig, GatedDeltaConfig, LayerConfig, MLPConfig
from moevlm.export.graph.gated_delta import GATED_DELTA, INPUTS, OUTPUTS, gated_delta_function
from moevlm.export.graph.op import node_spec
from moevlm.export.graph.trace import trace_decoder
from moevlm.export.graph.weights import Constant
from moevlm.export.modules.decoder import Decoder
from moevlm.export.parity.measures import relative_error
from moevlm.plugins.ops.gated_delta import gated_delta
from moevlm.plugins.ops.spec import DOMAIN, GatedDeltaSpec, attributes
from tests.support.delta_variants import DELTAS, STEPS, delta_inputs
from tests.support.runtimes import Array, runtimes

TOLERANCE = 3e-6  # the body is float32, the spec float64


def one_node(spec: GatedDeltaSpec) -> onnx.ModelProto:
    """A checked model whose one node is the op."""
    function = gated_delta_function(spec, (True,) * len(INPUTS))
    inputs = delta_inputs(spec, STEPS["decode"])
    node = onnx.helper.make_node(GATED_DELTA, INPUTS, OUTPUTS, domain=DOMAIN, **attributes(spec))
    given = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(inputs[name].dtype), [None] * inputs[name].ndim
        )
        for name in INPUTS
    ]
    made = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank)
        for name, rank in zip(OUTPUTS, (2, 3, 4), strict=True)
    ]
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "one_node", given, made)
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def assert_agrees(found: list[Array], spec: GatedDeltaSpec, inputs: dict[str, Array]) -> None:
    for ours, theirs in zip(found, gated_delta(**inputs, spec=spec), strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < TOLERANCE


@runtimes
@pytest.mark.parametrize("name", DELTAS)
def test_body_agrees_with_the_spec(name, runtime):
    spec = DELTAS[name]
    run = runtime(one_node(spec))
    for seed, lengths in enumerate(STEPS.values()):
        inputs = delta_inputs(spec, lengths, seed)
        assert_agrees(run(None, inputs), spec, inputs)


@runtimes
def test_rows_of_other_sequences_are_left_as_they_are(runtime):
    spec = DELTAS["shared_keys"]
    inputs = delta_inputs(spec, STEPS["mixed"])
    _, *states = runtime(one_node(spec))(None, inputs)
    others = sorted(set(range(len(inputs["conv_state"]))) - set(inputs["state_row"].tolist()))
    empty = inputs["state_row"][STEPS["mixed"].index(0)]
    for after, name in zip(states, ("conv_state", "delta_state"), strict=True):
        np.testing.assert_array_equal(after[[*others, empty]], inputs[name][[*others, empty]])


def test_node_without_a_state_is_refused():
    with pytest.raises(ValueError, match="GatedDelta takes the inputs qkv, a, b, conv_weight"):
        gated_delta_function(DELTAS["plain"], (True,) * 9)


def test_mixer_is_traced_to_one_node_between_its_projections():
    layer = LayerConfig(GatedDeltaConfig(2, 4, 8, 16, 4), MLPConfig(24, "silu"))
    config = DecoderConfig(
        vocabulary=50, hidden=32, context=64, epsilon=1e-6, tied_head=True, ropes=(), layers=(layer, layer)
    )
    with torch.device("meta"):
        module = Decoder(config)
    names = {name: Constant(np.zeros(value.shape, np.float32)) for name, value in module.named_parameters()}
    graph = trace_decoder(module, names).graph
    nodes = [node for node in graph if node.op_type == GATED_DELTA]
    assert [node_spec(node) for node in nodes] == [GatedDeltaSpec(2, 4, 8, 16, 4)] * 2
    assert [value.name for value in nodes[1].inputs[3:]] == [
        *("layers.1.attention.conv", "layers.1.attention.rate", "layers.1.attention.dt_bias"),
        *("conv_state.1", "delta_state.1", "query_start", "state_row"),
    ]
    outputs = [(value.name, str(value.shape)) for value in graph.outputs[1:]]
    assert outputs[2:] == [("conv_state_out.1", "[rows,3,96]"), ("delta_state_out.1", "[rows,4,8,16]")]
