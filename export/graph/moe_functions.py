"""The bodies of `moevlm::MoERouter` and `moevlm::MoEExperts` in standard ONNX."""

import numpy as np
import onnx
import onnx_ir as ir

from moevlm.export.graph.op import Op, function, is_op, register
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

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
# The loop runs over the experts that some token chose: the weights of the others are never read. -1 is no expert.
LOOP = """
    index = Cast <to = 7> (expert_index)
    flat = Reshape (index, minus_one)
    chosen = Unique <sorted = 1> (flat)
    is_expert = GreaterOrEqual (chosen, first)
    active = Compress <axis = 0> (chosen, is_expert)
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


def routes(value: ir.Value) -> bool:
    """Whether a value is the logits of a router, or of one of two between which a Where decides for each token."""
    users = value.consumers()
    return any(is_op(user, ROUTER) or (user.op_type == "Where" and routes(user.outputs[0])) for user in users)


def router_function(spec: RouterSpec, has_bias: bool, has_scale: bool = False) -> onnx.FunctionProto:
    """MoERouter(logits [T, E] f32, bias [E] f32 if has_bias, expert_scale [E] f32 if has_scale).

    Outputs: expert_index [T, k] i32, expert_weight [T, k] f32.
    """
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
    body.append("scaled = Mul (shares, scale)")
    if has_scale:
        body += ["factor = Gather (expert_scale, index)", "expert_weight = Mul (scaled, factor)"]
    else:
        body.append("expert_weight = Identity (scaled)")
    inputs = ["logits", "bias", "expert_scale"][: 3 if has_scale else 2 if has_bias else 1]
    return function(ROUTER, spec, inputs, ["expert_index", "expert_weight"], constants, body)


def experts_function(spec: ExpertsSpec, has_biases: bool) -> onnx.FunctionProto:
    """MoEExperts(x, expert_index, expert_weight, gate_up, down, gate_up_bias, down_bias if has_biases) -> y [T, H] f32.

    Shapes as in `moevlm.plugins.ops.experts.experts`.
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
    return function(EXPERTS, spec, inputs, ["y"], constants, [body])


def _router_body(spec: RouterSpec, present: tuple[bool, ...]) -> onnx.FunctionProto:
    return router_function(spec, present[1:2] == (True,), len(present) == 3)


def _experts_body(spec: ExpertsSpec, present: tuple[bool, ...]) -> onnx.FunctionProto:
    if len(present) == 6 or not all(present):
        raise ValueError(f"{EXPERTS} takes both biases, or none")
    return experts_function(spec, len(present) == 7)


register(Op(ROUTER, RouterSpec, _router_body, "router"))
register(Op(EXPERTS, ExpertsSpec, _experts_body, "experts"))
