"""Calls of moevlm.cpu::GatedDelta in ONNX Runtime, and its outputs held to the reference."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from moevlm.plugins.ops.gated_delta import gated_delta
from moevlm.plugins.ops.spec import GatedDeltaSpec, attributes
from moevlm.runtime.backends import libraries as native

RANKS = {  # of the inputs, in the operator's order
    "qkv": 2,
    "a": 2,
    "b": 2,
    "conv_weight": 2,
    "rate": 1,
    "dt_bias": 1,
    "conv_state": 3,
    "delta_state": 4,
    "query_start": 1,
    "state_row": 1,
}
STATES = ("conv_state", "delta_state")
OUTPUTS = ("y", *(f"{name}_out" for name in STATES))
Array = np.ndarray


@cache
def session(spec: GatedDeltaSpec, threads: int = 2, **changed: int | float) -> ort.InferenceSession:
    """Open in every dimension. changed: attributes that are not the spec's."""
    types = {name: TensorProto.INT32 if name in ("query_start", "state_row") else TensorProto.FLOAT for name in RANKS}
    node = helper.make_node("GatedDelta", list(RANKS), OUTPUTS, domain="moevlm.cpu", **(attributes(spec) | changed))
    graph = helper.make_graph(
        [node],
        "delta",
        [helper.make_tensor_value_info(name, types[name], [None] * rank) for name, rank in RANKS.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in OUTPUTS],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.operators_path()))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moevlm.cpu", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def packed(inputs: dict[str, Array]) -> dict[str, Array]:
    """The reference's inputs as the operator takes them: the convolution's weight lies token by token."""
    return inputs | {"conv_weight": np.ascontiguousarray(inputs["conv_weight"].T)}


def run(spec: GatedDeltaSpec, inputs: dict[str, Array], threads: int = 2) -> dict[str, Array]:
    """inputs: the reference's."""
    return dict(zip(OUTPUTS, session(spec, threads).run(None, packed(inputs)), strict=True))


def check(spec: GatedDeltaSpec, inputs: dict[str, Array], outputs: dict[str, Array], tolerance: float = 1e-5) -> None:
    """tolerance: of the largest result. Sums in float32, token after token."""
    expected = dict(zip(OUTPUTS, gated_delta(**inputs, spec=spec), strict=True))
    for name, array in expected.items():
        assert outputs[name].shape == array.shape
        assert np.isfinite(outputs[name]).all()
        np.testing.assert_allclose(
            outputs[name], array, rtol=0, atol=tolerance * np.abs(array).max(initial=1), err_msg=name
        )
    untouched = np.ones(len(inputs["delta_state"]), bool)
    untouched[inputs["state_row"][np.diff(inputs["query_start"]) > 0]] = False
    for name in STATES:
        np.testing.assert_array_equal(outputs[f"{name}_out"][untouched], inputs[name][untouched])
