"""One sparse block as a graph: moevlm ops between inputs and outputs, to be lowered and run."""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime

from bench import variants
from moevlm.export.graph.moe_functions import EXPERTS, ROUTER
from moevlm.export.graph.op import ONNX_OPSET
from moevlm.export.graph.weights import Constant, initializer
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import DOMAIN, ExpertsSpec, RouterSpec, attributes
from moevlm.runtime.backends.libraries import operators_path

SILU = ExpertsSpec()
TOKENS = (0, 1, 33)
# float32 on both sides, relative to the largest value of the output; the routed form takes a log and an exp more.
TOLERANCE = 2e-6


def value(name: str, shape: list[int | str | None], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def moe_block(
    router: RouterSpec,
    block: ExpertsSpec,
    weights: dict[str, np.ndarray],
    bias: np.ndarray | None = None,
    tap: bool = False,
    expert_scale: np.ndarray | None = None,
) -> ir.Model:
    """logits, x -> y, and with `tap` also the router's index and weight; everything else is an initializer."""
    logits, x = value("logits", ["T", "E"]), value("x", ["T", "H"])
    held = {name: initializer(name, Constant(array)) for name, array in weights.items()}
    optional = {"bias": bias, "expert_scale": expert_scale}
    held |= {name: initializer(name, Constant(array)) for name, array in optional.items() if array is not None}
    routing = [logits, *map(held.get, optional)]
    while routing[-1] is None:
        routing.pop()
    index, weight, y = (
        value("index", ["T", "k"], ir.DataType.INT32),
        value("weight", ["T", "k"]),
        value("y", ["T", "H"]),
    )
    nodes = [
        ir.node(ROUTER, routing, attributes(router), domain=DOMAIN, outputs=[index, weight]),
        ir.node(
            EXPERTS,
            [x, index, weight, *(held[name] for name in weights)],
            attributes(block),
            domain=DOMAIN,
            outputs=[y],
            name="layers.0.moe",
        ),
    ]
    graph = ir.Graph(
        [logits, x],
        [y, index, weight] if tap else [y],
        nodes=nodes,
        initializers=list(held.values()),
        opset_imports={"": ONNX_OPSET},
        name="moe_block",
    )
    return ir.Model(graph, ir_version=10)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    """On ONNX Runtime's CPU kernels and moevlm's own."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(operators_path()))
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(initial=0))


@dataclass
class Case:
    """A block of one router and one kind of experts, with seeded weights and, if asked, biases everywhere."""

    router: RouterSpec
    block: ExpertsSpec = SILU
    router_bias: bool = False
    expert_biases: bool = False
    experts: int = variants.EXPERTS
    hidden: int = 12
    inner: int = 6
    router_scale: bool = False
    weights: dict[str, np.ndarray] = field(init=False)
    bias: np.ndarray | None = field(init=False)
    expert_scale: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        self.weights = variants.expert_weights(self.block, self.expert_biases, self.hidden, self.inner, self.experts)
        given = variants.router_inputs(1, self.router_bias, self.experts, has_scale=self.router_scale)
        self.bias, self.expert_scale = given.get("bias"), given.get("expert_scale")

    def model(self, tap: bool = False) -> ir.Model:
        return moe_block(self.router, self.block, self.weights, self.bias, tap, self.expert_scale)

    def inputs(self, tokens: int) -> dict[str, np.ndarray]:
        logits = variants.router_inputs(tokens, False, self.experts, seed=tokens)["logits"]
        return {"logits": logits, "x": variants.hidden_states(tokens, self.hidden, seed=tokens)}

    def want(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        index, weight = route(inputs["logits"], self.router, self.bias, self.expert_scale)
        return reference_experts(inputs["x"], index, weight, spec=self.block, **self.weights)

    def check(self, model: ir.Model, tolerance: float = TOLERANCE) -> None:
        running = session(model)
        for tokens in TOKENS:
            inputs = self.inputs(tokens)
            assert_close(running.run(None, inputs)[0], self.want(inputs), tolerance)
