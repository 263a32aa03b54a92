"""The body of `moevlm::GatedDelta` in standard ONNX: a loop over sequences, and in it one over their tokens."""

import onnx

from moevlm.export.graph.op import Op, function, register
from moevlm.plugins.ops.spec import GatedDeltaSpec

GATED_DELTA = "GatedDelta"
INPUTS = (
    *("qkv", "a", "b", "conv_weight", "rate", "dt_bias"),
    *("conv_state", "delta_state", "query_start", "state_row"),
)
OUTPUTS = ("y", "conv_state_out", "delta_state_out")

# For each token and value head: exp(-rate * softplus(a + dt_bias)) and sigmoid(b). Value heads stand in groups that
# share a key head; the last two axes are those of a state.
GATES = """
    start = Cast <to = 7> (query_start)
    rows = Cast <to = 7> (state_row)
    biased = Add (a, dt_bias)
    soft = Softplus (biased)
    rated = Mul (soft, rate)
    log_decay = Neg (rated)
    decay_2d = Exp (log_decay)
    decay = Reshape (decay_2d, gate_split)
    beta_2d = Sigmoid (b)
    beta = Reshape (beta_2d, gate_split)
    taps = Transpose <perm = [1, 0]> (conv_weight)
"""
# The convolution as one product per tap: row j of what was taken in is `kernel - 1 - j` tokens older than the newest.
TAP = """
    tap_start_{j} = Constant <value_ints = [{j}]> ()
    tap_end_{j} = Add (tap_start_{j}, padded_1)
    shifted_{j} = Slice (taken, tap_start_{j}, tap_end_{j}, zero_1)
    tap_{j} = Gather (taps, tap_start_{j})
    part_{j} = Mul (shifted_{j}, tap_{j})
"""
LENGTH = """
    {x}_squares = ReduceSumSquare <keepdims = 1> ({x}_heads, minus_one_1)
    {x}_squared = Add ({x}_squares, epsilon)
    {x}_length = Sqrt ({x}_squared)
    {x}_unit = Div ({x}_heads, {x}_length)
"""
# Behind a sequence's tokens stands one that neither forgets nor learns, for a loop must take one trip at least: onnx's
# reference evaluator has no result for none. Each state is read and written once for a sequence, as a vector.
LOOP = """
    count = Size (rows)
    nothing = ConstantOfShape (none_shape)
    y, conv_rows, delta_rows = Loop <body = one_sequence (int64 n, bool go, float[?, ?] y_in)
        => (bool go_on, float[?, ?] y_more, float[?] conv_new, float[?] delta_new) {{
        go_on = Identity (go)
        n_1 = Unsqueeze (n, zero_1)
        next_1 = Add (n_1, one_1)
        from_1 = Gather (start, n_1)
        to_1 = Gather (start, next_1)
        own_1 = Sub (to_1, from_1)
        padded_1 = Add (own_1, one_1)
        row = Gather (rows, n)
        own_qkv = Slice (qkv, from_1, to_1, zero_1)
        conv_before = Gather (conv_state, row)
        taken = Concat <axis = 0> (conv_before, own_qkv, no_token)
        kept_end = Add (own_1, older_1)
        conv_after = Slice (taken, own_1, kept_end, zero_1)
        conv_new = Reshape (conv_after, minus_one_1)
        {convolution}
        gate_c = Sigmoid (convolved)
        mixed = Mul (convolved, gate_c)
        q_rows, k_rows, v_rows = Split <axis = 1> (mixed, widths)
        q_heads = Reshape (q_rows, key_split)
        k_heads = Reshape (k_rows, key_split)
        {lengths}
        q_scaled = Mul (q_unit, scale)
        v_heads = Reshape (v_rows, value_split)
        own_decay = Slice (decay, from_1, to_1, zero_1)
        own_beta = Slice (beta, from_1, to_1, zero_1)
        decays = Concat <axis = 0> (own_decay, no_decay)
        betas = Concat <axis = 0> (own_beta, no_beta)
        trips_1 = Max (own_1, one_1)
        trips = Squeeze (trips_1)
        delta_before_3d = Gather (delta_state, row)
        delta_before = Reshape (delta_before_3d, state_split)
        delta_after, y_rows = Loop <body = one_token (int64 t, bool going, float[?, ?, ?, ?] state)
            => (bool going_on, float[?, ?, ?, ?] state_on, float[?] y_t) {{
            going_on = Identity (going)
            q_t = Gather (q_scaled, t)
            k_t = Gather (k_unit, t)
            v_t = Gather (v_heads, t)
            decay_t = Gather (decays, t)
            beta_t = Gather (betas, t)
            decayed = Mul (state, decay_t)
            held = MatMul (k_t, decayed)
            missing = Sub (v_t, held)
            learned = Mul (missing, beta_t)
            k_column = Transpose <perm = [0, 1, 3, 2]> (k_t)
            update = Mul (k_column, learned)
            state_on = Add (decayed, update)
            y_heads = MatMul (q_t, state_on)
            y_t = Reshape (y_heads, minus_one_1)
        }}> (trips, true, delta_before)
        delta_new = Reshape (delta_after, minus_one_1)
        own_y = Slice (y_rows, zero_1, own_1, zero_1)
        y_more = Concat <axis = 0> (y_in, own_y)
    }}> (count, true, nothing)
    row_column = Unsqueeze (rows, one_1)
    conv_shape = Shape (conv_state)
    conv_row_shape = Slice (conv_shape, one_1, far_1)
    conv_rows_shape = Concat <axis = 0> (minus_one_1, conv_row_shape)
    conv_rows_3d = Reshape (conv_rows, conv_rows_shape)
    conv_state_out = ScatterND (conv_state, row_column, conv_rows_3d)
    delta_rows_4d = Reshape (delta_rows, delta_rows_shape)
    delta_state_out = ScatterND (delta_state, row_column, delta_rows_4d)
"""


def gated_delta_function(spec: GatedDeltaSpec, present: tuple[bool, ...]) -> onnx.FunctionProto:
    """GatedDelta as `moevlm.plugins.ops.gated_delta.gated_delta`. Raises ValueError where an input is absent."""
    if present != (True,) * len(INPUTS):
        raise ValueError(f"{GATED_DELTA} takes the inputs {', '.join(INPUTS)}")
    parts = ", ".join(f"part_{j}" for j in range(spec.kernel))
    convolution = "".join(TAP.format(j=j) for j in range(spec.kernel)) + f"convolved = Sum ({parts})"
    lengths = "".join(LENGTH.format(x=x) for x in ("q", "k"))
    keys, shared = spec.key_heads, spec.value_heads // spec.key_heads
    width, value_width = keys * spec.key_dim, spec.value_heads * spec.value_dim
    constants = {
        **{"zero_1": [0], "one_1": [1], "minus_one_1": [-1], "far_1": [2**62], "older_1": [spec.kernel - 1]},
        **{"true": True, "epsilon": float(spec.epsilon), "scale": float(spec.scale or spec.key_dim**-0.5)},
        **{"widths": [width, width, value_width], "none_shape": [0, value_width]},
        **{"gate_split": [0, keys, shared, 1, 1], "key_split": [0, keys, 1, 1, spec.key_dim]},
        **{"value_split": [0, keys, shared, 1, spec.value_dim], "state_split": [keys, shared, spec.key_dim, -1]},
        "delta_rows_shape": [-1, spec.value_heads, spec.key_dim, spec.value_dim],
        "no_token": [[0.0] * spec.channels],
        "no_decay": [[[[[1.0]]] * shared] * keys],
        "no_beta": [[[[[0.0]]] * shared] * keys],
    }
    body = [GATES, LOOP.format(convolution=convolution, lengths=lengths)]
    return function(GATED_DELTA, spec, list(INPUTS), list(OUTPUTS), constants, body)


register(Op(GATED_DELTA, GatedDeltaSpec, gated_delta_function, "gated_delta"))
