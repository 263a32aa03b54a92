"""The bodies of `moevlm::MoERouter` and `moevlm::MoEExperts` in standard ONNX, opset 24.

A body is put together from one fragment per attribute value. It is specialised to its node's attributes, yet declares
their names, so that nodes carry them for whoever replaces the op (a TensorRT plugin, a pass). Optional inputs are left
out of the signature where the node has none: onnx's reference evaluator wants as many arguments as a function declares.
"""

import re
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from moevlm.export.graph.attention_functions import (
    cached_attention_function,
    segment_attention_function,
    segment_flash_attention_function,
)
from moevlm.plugins.ops.spec import DOMAIN, OPSET_VERSION, ExpertsSpec, RouterSpec
from moevlm.runtime.core.errors import UnsupportedModelError

ONNX_OPSET = 24
ROUTER, EXPERTS = "MoERouter", "MoEExperts"

SCORING = {
    "softmax": "scores = Softmax <axis = -1> (logits)",
    "sigmoid": "scores = Sigmoid (logits)",
    "softmax_after_topk": "scores = Identity (logits)",
}
GROUP_SCORE = {
    "max": "group_score = ReduceMax <keepdims = 0> (grouped, axis_2)",
    "top2_sum": """
        best_two, best_two_at = TopK <axis = -1> (grouped, two)
        group_score = ReduceSum <keepdims = 0> (best_two, axis_2)""",
}
# The grouped shape is spelled out, and allowzero set, because [0, n_group, -1] cannot be inferred for zero tokens.
GROUPS = """
    tokens = Shape <start = 0, end = 1> (logits)
    experts = Shape <start = 1, end = 2> (logits)
    group_size = Div (experts, n_group)
    grouped_shape = Concat <axis = 0> (tokens, n_group, group_size)
    grouped = Reshape <allowzero = 1> (choice_of_all, grouped_shape)
    {group_score}
    best_group_score, best_group = TopK <axis = -1> (group_score, topk_group)
    group_hit = OneHot <axis = -1> (best_group, group_count, off_on)
    group_kept_f = ReduceMax <keepdims = 0> (group_hit, axis_1)
    group_kept = Cast <to = 9> (group_kept_f)
    expert_kept = Unsqueeze (group_kept, axis_2)
    masked = Where (expert_kept, grouped, minus_inf)
    logits_shape = Shape (logits)
    choice = Reshape <allowzero = 1> (masked, logits_shape)
"""
RENORMALIZE = """
    total = ReduceSum <keepdims = 1> (picked, axis_1)
    divisor = Add (total, epsilon)
    shares = Div (picked, divisor)
"""

ACTIVATION = {
    "silu": """
        sigmoid = Sigmoid (gate)
        activated = Mul (gate, sigmoid)
        factor = Identity (up)""",
    "gelu_tanh": """
        activated = Gelu <approximate = "tanh"> (gate)
        factor = Identity (up)""",
    "swiglu_clamped": """
        low_gate = Min (gate, limit)
        steep = Mul (low_gate, alpha)
        sigmoid = Sigmoid (steep)
        activated = Mul (low_gate, sigmoid)
        near_up = Clip (up, minus_limit, limit)
        factor = Add (near_up, one)""",
}
SPLIT = {
    True: "gate, up = Split <axis = 1, num_outputs = 2> (projected)",
    False: "gate = Identity (projected)\n up = Identity (one)",
}
LINEAR = {
    False: """
        {weight}_e = Gather ({weight}, expert)
        {y} = Gemm <transB = 1> ({x}, {weight}_e)""",
    True: """
        {weight}_e = Gather ({weight}, expert)
        {weight}_bias_e = Gather ({weight}_bias, expert)
        {y} = Gemm <transB = 1> ({x}, {weight}_e, {weight}_bias_e)""",
}
# The loop runs over the experts that some token chose: the weights of the others are never read.
LOOP = """
    index = Cast <to = 7> (expert_index)
    flat = Reshape (index, minus_one)
    active = Unique <sorted = 1> (flat)
    trips = Size (active)
    x_shape = Shape (x)
    nothing = Expand (zero, x_shape)
    y = Loop <body = one_expert (int64 i, bool go, float[?, ?] sum_in) => (bool go_on, float[?, ?] sum_out) {{
        go_on = Identity (go)
        expert = Gather (active, i)
        hit = Equal (index, expert)
        hit_at = NonZero (hit)
        token_slot = Transpose <perm = [1, 0]> (hit_at)
        token = Gather (hit_at, first)
        weight_1d = GatherND (expert_weight, token_slot)
        weight = Unsqueeze (weight_1d, axis_1)
        chosen_rows = Gather (x, token)
        {weigh_rows}
        {project_in}
        {split}
        {activate}
        inner = Mul (activated, factor)
        {project_out}
        {weigh_out}
        token_2d = Unsqueeze (token, axis_1)
        sum_out = ScatterND <reduction = "add"> (sum_in, token_2d, weighted_out)
    }}> (trips, true, nothing)
"""


def router_function(spec: RouterSpec, has_bias: bool) -> onnx.FunctionProto:
    """MoERouter(logits [T, E] f32, bias [E] f32 if has_bias) -> (expert_index [T, k] i32, expert_weight [T, k] f32)."""
    constants = {"top_k": [spec.top_k], "scale": float(spec.scale), "epsilon": float(spec.epsilon), "axis_1": [1]}
    body = [SCORING[spec.scoring], f"choice_of_all = {'Add (scores, bias)' if has_bias else 'Identity (scores)'}"]
    if spec.n_group > 1:
        constants |= {"n_group": [spec.n_group], "group_count": spec.n_group, "topk_group": [spec.topk_group]}
        constants |= {"two": [2], "axis_2": [2], "minus_inf": -np.inf, "off_on": [0.0, 1.0]}
        body.append(GROUPS.format(group_score=GROUP_SCORE[spec.group_score]))
    else:
        body.append("choice = Identity (choice_of_all)")
    body.append("best, index = TopK <axis = -1> (choice, top_k)")
    body.append("expert_index = Cast <to = 6> (index)")
    body.append("score = GatherElements <axis = 1> (scores, index)")
    after_topk = spec.scoring == "softmax_after_topk"
    body.append(f"picked = {'Softmax <axis = -1> (score)' if after_topk else 'Identity (score)'}")
    body.append(RENORMALIZE if spec.renormalize else "shares = Identity (picked)")
    body.append("expert_weight = Mul (shares, scale)")
    inputs = ["logits", "bias"] if has_bias else ["logits"]
    return _function(ROUTER, spec, inputs, ["expert_index", "expert_weight"], constants, body)


def experts_function(spec: ExpertsSpec, has_biases: bool) -> onnx.FunctionProto:
    """MoEExperts(x, expert_index, expert_weight, gate_up, down, gate_up_bias, down_bias if has_biases) -> y [T, H] f32.

    Shapes as in `moevlm.plugins.ops.reference.experts`.
    """
    on_input = spec.weight_on == "input"
    body = LOOP.format(
        weigh_rows=f"rows = {'Mul (chosen_rows, weight)' if on_input else 'Identity (chosen_rows)'}",
        project_in=LINEAR[has_biases].format(y="projected", x="rows", weight="gate_up"),
        split=SPLIT[spec.gated],
        activate=ACTIVATION[spec.activation],
        project_out=LINEAR[has_biases].format(y="out", x="inner", weight="down"),
        weigh_out=f"weighted_out = {'Identity (out)' if on_input else 'Mul (out, weight)'}",
    )
    constants = {"minus_one": [-1], "axis_1": [1], "first": 0, "zero": 0.0, "one": 1.0, "true": True}
    constants |= {"alpha": float(spec.alpha), "limit": float(spec.limit), "minus_limit": -float(spec.limit)}
    inputs = ["x", "expert_index", "expert_weight", "gate_up", "down"]
    inputs += ["gate_up_bias", "down_bias"] if has_biases else []
    return _function(EXPERTS, spec, inputs, ["y"], constants, [body])


def _function(
    name: str,
    spec: RouterSpec | ExpertsSpec,
    inputs: list[str],
    outputs: list[str],
    constants: dict[str, Any],
    body: list[str],
) -> onnx.FunctionProto:
    """A function of domain moevlm from ONNX text; of `constants`, those that the text names become Constant nodes."""
    text = "\n".join(body)
    attributes = ", ".join(f.name for f in fields(spec))
    function = onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {ONNX_OPSET}]>'
        f"{name} <{attributes}> ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{text}\n}}"
    )
    named = set(re.findall(r"\w+", text))
    nodes = [_constant(key, value) for key, value in constants.items() if key in named] + list(function.node)
    del function.node[:]
    function.node.extend(nodes)
    return function


def _constant(name: str, value: bool | int | float | list[int] | list[float]) -> onnx.NodeProto:
    array = np.array(value)
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    return onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array, name))


def router_spec(node: ir.Node) -> RouterSpec:
    """The attributes of a MoERouter node."""
    return RouterSpec(**_attributes(node, RouterSpec))


def experts_spec(node: ir.Node) -> ExpertsSpec:
    """The attributes of a MoEExperts node."""
    return ExpertsSpec(**_attributes(node, ExpertsSpec))


def _attributes(node: ir.Node, spec: type) -> dict[str, Any]:
    # ONNX keeps floats in 32 bits: through the shortest text that means the same float32, 1e-20 is 1e-20 again.
    kinds = get_type_hints(spec)
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    return {k: float(str(np.float32(v))) if kinds[k] is float else kinds[k](v) for k, v in values.items()}


def is_op(node: ir.Node, op_type: str) -> bool:
    """Whether `node` is this project's op of that name."""
    return node.domain == DOMAIN and node.op_type == op_type


def add_functions(model: ir.Model) -> None:
    """Give every moevlm node in `model` its body, and drop the bodies that no node uses.

    Where nodes of one op differ in spec or in their optional inputs, the second and later bodies become overloads "2",
    "3", and so on, which ONNX Runtime runs and onnx's reference evaluator does not. Needs IR version 10.
    """
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    bodies: dict[str, list[_Body]] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
        known = bodies.setdefault(node.op_type, [])
        body = _body(node)
        if body not in known:
            known.append(body)
        node.overload = _overload(known.index(body))
    for known in bodies.values():
        for place, (make, *arguments) in enumerate(known):
            function = make(*arguments)
            function.overload = _overload(place)
            loaded = ir.serde.deserialize_function(function)
            model.functions[loaded.identifier()] = loaded
    if bodies:
        model.graph.opset_imports[DOMAIN] = OPSET_VERSION
    else:
        model.graph.opset_imports.pop(DOMAIN, None)


# What makes a node's body, and the arguments that it depends on.
_Body = tuple[Any, ...]


_ATTENTION = {
    "CachedAttention": cached_attention_function,
    "SegmentAttention": segment_attention_function,
    "SegmentFlashAttention": segment_flash_attention_function,
}


def _overload(place: int) -> str:
    return str(place + 1) if place else ""


def _body(node: ir.Node) -> _Body:
    if node.op_type in _ATTENTION:
        return (_ATTENTION[node.op_type],)
    if node.op_type == ROUTER:
        return router_function, router_spec(node), len(node.inputs) == 2
    if node.op_type != EXPERTS:
        raise UnsupportedModelError(f"node {node.name}: no op {DOMAIN}::{node.op_type} (known: {ROUTER}, {EXPERTS})")
    if len(node.inputs) == 6 or None in node.inputs:
        raise UnsupportedModelError(f"node {node.name}: {EXPERTS} takes both biases, or none")
    return experts_function, experts_spec(node), len(node.inputs) == 7
