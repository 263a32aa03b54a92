"""The ops of domain moevlm: each is registered once, with its spec, the torch op it is traced from, and its body.

A body is put together from one fragment per attribute value. It is specialised to its node's attributes, yet declares
their names, so that nodes carry them for whoever replaces the op (a TensorRT plugin, a pass). Optional inputs that a
node has not are left out behind the last that it has, and unused before: onnx's reference evaluator wants as many
arguments as a function declares.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from moevlm.plugins.ops.spec import DOMAIN

ONNX_OPSET = 24


@dataclass(frozen=True)
class Op:
    """One op. name: its nodes' op_type. spec: the dataclass whose fields are its attributes.

    body: a node's spec, and which of its inputs are there, to the op in standard ONNX; raises ValueError for inputs
    that do not go together. torch_name: of the op in `torch.ops.moevlm` that is traced to it: its arguments are the
    inputs, then the attributes; empty for an op that only a pass makes.
    """

    name: str
    spec: type
    body: Callable[[Any, tuple[bool, ...]], onnx.FunctionProto]
    torch_name: str = ""


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Make an op known to the translation of torch programs and to `functions.add_functions`."""
    OPS[op.name] = op
    return op


def traced_op(torch_name: str) -> Op | None:
    """The op that `torch.ops.moevlm.<torch_name>` is traced to."""
    return next((op for op in OPS.values() if op.torch_name == torch_name), None)


def is_op(node: ir.Node, op_type: str) -> bool:
    """Whether `node` is this project's op of that name."""
    return node.domain == DOMAIN and node.op_type == op_type


def node_spec(node: ir.Node) -> Any:
    """The attributes of a node of a registered op, as its spec."""
    spec = OPS[node.op_type].spec
    # ONNX keeps floats in 32 bits: through the shortest text that means the same float32, 1e-20 is 1e-20 again.
    kinds = get_type_hints(spec)
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    return spec(**{k: float(str(np.float32(v))) if kinds[k] is float else kinds[k](v) for k, v in values.items()})


def function(
    name: str, spec: Any, inputs: list[str], outputs: list[str], constants: dict[str, Any], body: list[str]
) -> onnx.FunctionProto:
    """A function of domain moevlm from ONNX text; of `constants`, those that the text names become Constant nodes."""
    text = "\n".join(body)
    attributes = ", ".join(f.name for f in fields(spec))
    made = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {ONNX_OPSET}]>'
        f"{name} <{attributes}> ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{text}\n}}"
    )
    named = set(re.findall(r"\w+", text))
    nodes = [_constant(key, value) for key, value in constants.items() if key in named] + list(made.node)
    del made.node[:]
    made.node.extend(nodes)
    return made


def _constant(name: str, value: bool | int | float | list[int] | list[float]) -> onnx.NodeProto:
    array = np.array(value)
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    return onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array, name))
