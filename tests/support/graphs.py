"""Small graphs with stored weights, and what a quantized kernel sees of a weight."""

import numpy as np
import onnx_ir as ir

from moevlm.export.formats.integers import IntFormat
from moevlm.export.graph.op import ONNX_OPSET
from moevlm.export.graph.weights import Constant, initializer
from moevlm.plugins.ops.spec import DOMAIN


def rounded(weight: np.ndarray, scheme: IntFormat) -> np.ndarray:
    """What a kernel sees of a weight [..., K]."""
    width = weight.shape[-1]
    flat = scheme.decode(*scheme.encode(weight.reshape(-1, width)))[:, :width]
    return flat.reshape(weight.shape)


def graph(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], **weights: np.ndarray) -> ir.Model:
    held = {name: initializer(name, Constant(array)) for name, array in weights.items()}
    for node in nodes:
        for i, given in enumerate(node.inputs):
            if given is not None and given.name in held:
                node.replace_input_with(i, held[given.name])
    imports = {"": ONNX_OPSET, DOMAIN: 1}
    made = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(held.values()), opset_imports=imports, name="g")
    return ir.Model(made, ir_version=11)


def gemm(x: ir.Value, weight: str, out: ir.Value, bias: str | None = None) -> ir.Node:
    inputs = [x, ir.Value(name=weight), *([ir.Value(name=bias)] if bias else [])]
    return ir.node("Gemm", inputs, {"transB": 1}, outputs=[out])


def matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng().standard_normal(shape).astype(np.float32)
