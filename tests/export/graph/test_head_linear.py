"""The numpy reference of HeadLinear, its body in standard ONNX, and the same as one batched product."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moevlm.export.backends.cpu.passes.head_linear import CpuHeadLinear
from moevlm.export.formats.integers import IntFormat
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.head_linear import HEAD_LINEAR
from moevlm.export.passes.base import Pass, checked, run
from moevlm.export.passes.lower_head_linear import LowerHeadLinear
from moevlm.plugins.ops.head_linear import head_linear
from moevlm.plugins.ops.spec import DOMAIN
from tests.support.graphs import graph
from tests.support.runtimes import Run, runtimes

HEADS, OUT, SIZE = 3, 7, 5


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((HEADS, OUT, SIZE), np.float32)


def rows(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).standard_normal((tokens, HEADS * SIZE), np.float32)


def model_of(weight: np.ndarray) -> ir.Model:
    x, y = rows_of("x", SIZE), rows_of("y", OUT)
    node = ir.node(HEAD_LINEAR, [x, ir.Value(name="weight")], {"heads": HEADS}, domain=DOMAIN, outputs=[y])
    return graph([node], [x], [y], weight=weight)


def rows_of(name: str, size: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["T", HEADS * size]), type=ir.TensorType(ir.DataType.FLOAT))


def test_each_head_has_a_matrix(weight: np.ndarray) -> None:
    x = rows(4)
    y = head_linear(x, weight)
    for t in range(4):
        for head in range(HEADS):
            own = weight[head] @ x[t, head * SIZE : (head + 1) * SIZE]
            np.testing.assert_allclose(y[t, head * OUT : (head + 1) * OUT], own, rtol=1e-5, atol=1e-6)


@runtimes
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("step", [None, LowerHeadLinear()], ids=["body", "lowered"])
def test_onnx_agrees(runtime: Run, tokens: int, step: Pass | None, weight: np.ndarray) -> None:
    model = model_of(weight)
    add_functions(model)
    if step is not None:
        with checked():
            assert run((step,), model) == {"LowerHeadLinear": 1}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    (y,) = runtime(proto)(None, {"x": rows(tokens)})
    np.testing.assert_allclose(y, head_linear(rows(tokens), weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [LowerHeadLinear(), CpuHeadLinear(IntFormat(4, 32))], ids=["lowered", "cpu"])
def test_a_weight_that_is_not_stored_is_not_taken(step: Pass, weight: np.ndarray) -> None:
    model = model_of(weight)
    given = rows_of("weight", OUT)
    model.graph.inputs.append(given)
    next(iter(model.graph)).replace_input_with(1, given)
    assert list(step.requires(model)) == ["the weight of y is not stored"]
    assert not list(step.requires(model_of(weight)))
    assert list(step.ensures(model_of(weight)))
