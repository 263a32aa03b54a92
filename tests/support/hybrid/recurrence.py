"""moevlm::GatedRecurrence: h = a * h + (1 - a) * x for each channel, one state row a sequence."""

from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from moevlm.export.graph.op import Op, function, register

# Token after token: each reads and writes its sequence's row.
BODY = """
    start = Cast <to = 7> (query_start)
    rows = Cast <to = 7> (state_row)
    ends = Slice (start, one_1, far_1)
    rest = Sub (one_f, decay)
    tokens = Shape <start = 0, end = 1> (x)
    trips = Squeeze (tokens)
    state_out, y = Loop <body = one_token (int64 t, bool go, float[?, ?] kept)
        => (bool go_on, float[?, ?] kept_on, float[?] h_new) {
        go_on = Identity (go)
        ended = GreaterOrEqual (t, ends)
        ended_i = Cast <to = 7> (ended)
        sequence = ReduceSum <keepdims = 0> (ended_i)
        row = Gather (rows, sequence)
        h = Gather (kept, row)
        x_t = Gather (x, t)
        h_decayed = Mul (decay, h)
        x_part = Mul (rest, x_t)
        h_new = Add (h_decayed, x_part)
        place = Reshape (row, one_by_one)
        h_row = Unsqueeze (h_new, zero_1)
        kept_on = ScatterND (kept, place, h_row)
    }> (trips, true, state)
"""


@dataclass(frozen=True)
class RecurrenceSpec:
    """channels: how many. The op's attribute."""

    channels: int


def _body(spec: RecurrenceSpec, _: tuple[bool, ...]) -> onnx.FunctionProto:
    constants = {"one_1": [1], "zero_1": [0], "far_1": [2**62], "one_f": 1.0, "one_by_one": [1, 1], "true": True}
    inputs = ["x", "decay", "state", "query_start", "state_row"]
    return function("GatedRecurrence", spec, inputs, ["y", "state_out"], constants, [BODY])


register(Op("GatedRecurrence", RecurrenceSpec, _body, "gated_recurrence"))


@torch.library.custom_op("moevlm::gated_recurrence", mutates_args=())
def gated_recurrence(
    x: Tensor, decay: Tensor, state: Tensor, query_start: Tensor, state_row: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """x [T, C], decay [C], state [rows, C] -> h after each token [T, C], and the state after the step."""
    y, state = torch.empty(len(x), channels), state.clone()
    for n, row in enumerate(state_row.tolist()):
        for t in range(int(query_start[n]), int(query_start[n + 1])):
            y[t] = state[row] = decay * state[row] + (1 - decay) * x[t]
    return y, state


@gated_recurrence.register_fake
def _(x: Tensor, _: Tensor, state: Tensor, *__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(state)
