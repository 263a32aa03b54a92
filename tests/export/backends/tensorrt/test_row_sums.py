"""Projections onto one number, as the gate of a shared expert, in the graphs that TensorRT is given."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from moevlm.export.backends.tensorrt.passes.row_sums import RowSums
from moevlm.export.graph.weights import Constant, initializer
from moevlm.export.passes.base import run


def gates(rows: int, dtype: np.dtype) -> tuple[ir.Model, np.ndarray]:
    """y = x w, and w [rows, 8]."""
    kind = ir.TensorType(ir.DataType.from_numpy(dtype))
    w = np.random.default_rng(0).standard_normal((rows, 8)).astype(dtype)
    weight = initializer("w", Constant(w))
    x, y = (ir.Value(name=name, shape=ir.Shape(["tokens", size]), type=kind) for name, size in (("x", 8), ("y", rows)))
    node = ir.node("Gemm", [x, weight], {"transB": 1}, outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=11), w


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_number_of_a_row_is_a_sum_in_float32(dtype: type) -> None:
    model, w = gates(1, np.dtype(dtype))
    assert run([RowSums()], model) == {"RowSums": 1}
    assert [node.op_type for node in model.graph].count("Gemm") == 0
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(dtype)
    (y,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(y, (x.astype(np.float64) @ w.T.astype(np.float64)).astype(dtype), rtol=1e-3)
    assert y.dtype == dtype and y.shape == (5, 1)


def test_other_projections_stay() -> None:
    model, _ = gates(2, np.dtype(np.float32))
    assert run([RowSums()], model) == {"RowSums": 0}
