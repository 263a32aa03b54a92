"""The gated delta rule on ONNX Runtime's kernels, against the numpy spec."""

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from moevlm.export.backends.ort.passes.lower_gated_delta import LowerGatedDelta
from moevlm.export.graph.gated_delta import GATED_DELTA, INPUTS, OUTPUTS
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.base import CONTRIB, run
from moevlm.plugins.ops.gated_delta import gated_delta
from moevlm.plugins.ops.spec import DOMAIN, GatedDeltaSpec, attributes
from tests.support.delta_variants import DELTAS, delta_inputs
from tests.support.graphs import graph

TOLERANCE = 3e-6  # the kernels are float32, the spec float64
STORED = ("conv_weight", "rate", "dt_bias")


def lowered(spec: GatedDeltaSpec, inputs: dict[str, np.ndarray]) -> ir.Model:
    """One node with its weights stored, lowered."""
    given = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(inputs[name].dtype)),
            shape=ir.Shape([None] * inputs[name].ndim),
        )
        for name in INPUTS
        if name not in STORED
    }
    node = ir.node(
        GATED_DELTA,
        [given[name] if name in given else ir.Value(name=name) for name in INPUTS],
        attributes(spec),
        domain=DOMAIN,
        num_outputs=3,
    )
    for value, name, rank in zip(node.outputs, OUTPUTS, (2, 3, 4), strict=True):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * rank)
    model = graph([node], list(given.values()), list(node.outputs), **{name: inputs[name] for name in STORED})
    assert run([LowerGatedDelta()], model) == {"LowerGatedDelta": 1}
    return model


@pytest.mark.parametrize("name", DELTAS)
def test_kernels_agree_with_the_spec_in_a_prompt_and_token_by_token(name: str) -> None:
    spec, inputs = DELTAS[name], delta_inputs(DELTAS[name], (9,))
    model = lowered(spec, inputs)
    assert [node.op_type for node in model.graph if node.domain == CONTRIB] == [
        "CausalConvWithState",
        "LinearAttention",
    ]
    assert not any(node.domain == DOMAIN for node in model.graph)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = gated_delta(**inputs, spec=spec)
    kept = {name: value for name, value in inputs.items() if name not in STORED}
    found = []
    for start, stop in pairwise((0, 6, 7, 8, 9)):
        rows = {name: inputs[name][start:stop] for name in ("qkv", "a", "b")}
        feeds = kept | rows | {"query_start": np.array([0, stop - start], np.int32)}
        y, kept["conv_state"], kept["delta_state"] = session.run(None, feeds)
        found.append(y)
    for ours, theirs in zip((np.concatenate(found), kept["conv_state"], kept["delta_state"]), wanted, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < TOLERANCE
