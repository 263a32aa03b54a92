"""The body of `moevlm::PagedAttention` in standard ONNX: pages are written in one scatter, and read per sequence."""

from typing import NamedTuple

import onnx
import onnx_ir as ir

from moevlm.export.graph import paged_attention_parts as parts
from moevlm.export.graph.op import Op, function, register
from moevlm.plugins.ops.spec import AttentionSpec

PAGED_ATTENTION = "PagedAttention"


class Inputs(NamedTuple):
    """The inputs of a PagedAttention node, in order; None where it has none."""

    q: ir.Value | None = None
    k: ir.Value | None = None
    v: ir.Value | None = None
    cos: ir.Value | None = None
    sin: ir.Value | None = None
    key_cache: ir.Value | None = None
    value_cache: ir.Value | None = None
    query_start: ir.Value | None = None
    context_len: ir.Value | None = None
    page_table: ir.Value | None = None
    q_norm: ir.Value | None = None
    k_norm: ir.Value | None = None
    sinks: ir.Value | None = None
    visible_end: ir.Value | None = None


INPUTS = Inputs._fields


def paged_attention_function(spec: AttentionSpec, present: tuple[bool, ...]) -> onnx.FunctionProto:
    """PagedAttention as `moevlm.plugins.ops.attention.attention`, for inputs of which only these are present.

    Raises ValueError for inputs that do not go together.
    """
    given = {name for name, there in zip(INPUTS, present, strict=False) if there}
    useless = {"value_cache"} if spec.value_in_key else set()
    useless |= set() if spec.has_values else {"v"}
    useless |= set() if spec.rotary_dim else {"cos", "sin"}
    missing, norms = set(INPUTS[:10]) - useless - given, {"q_norm", "k_norm"} & given
    if missing or len(norms) == 1 or given & useless:
        names = ", ".join(name for name in INPUTS if name in given)
        raise ValueError(
            f"{PAGED_ATTENTION} with value_in_key = {int(spec.value_in_key)}, value_is_key = {int(spec.value_is_key)}, "
            f"rotary_dim = {spec.rotary_dim} cannot have the inputs {names}"
        )
    rotated = spec.rotary_dim > 0
    text = [parts.PLACES, parts.TABLES if rotated else ""]
    for x in ("q", "k"):
        text += [f"{x}_heads = Reshape ({x}, {'q' if x == 'q' else 'kv'}_split)"]
        text += [parts.NORM[bool(norms)].format(x=x, epsilon=f"{spec.epsilon:.9g}"), parts.ROTATE[rotated].format(x=x)]
    text += [parts.SCALE[spec.scale > 0], "q_groups = Reshape (q_scaled, group_split)"]
    text += ["key_cache_out = ScatterND (key_cache, slot, k_turned)"]
    if not spec.value_in_key:
        text += [parts.VALUES[spec.value_is_key], parts.VALUE_NORM[spec.value_norm], parts.WRITE_VALUES]
    text += ["sink = Reshape (sinks, sink_shape)"] if "sinks" in given else []
    text += ["end = Cast <to = 7> (visible_end)"] if "visible_end" in given else []
    text += [
        "value_width_1 = Identity (value_dim_1)"
        if spec.value_in_key
        else "value_width_1 = Shape <start = 3, end = 4> (value_cache)",
        parts.LOOP.format(
            read_values=parts.READ_VALUES[spec.value_in_key],
            softcap=parts.SOFTCAP[spec.softcap > 0],
            visible=parts.VISIBLE["visible_end" in given],
            window=parts.WINDOW[spec.window > 0],
            chunk=parts.CHUNK[spec.chunk > 0],
            softmax=parts.SOFTMAX["sinks" in given],
        ),
    ]
    group = spec.heads // spec.kv_heads
    half, start = spec.rotary_dim // 2, spec.rotary_start
    constants = {
        **{"zero": 0, "one": 1, "true": True, "minus_inf": -float("inf"), "last_two": [1, 2], "far_1": [2**62]},
        **{"zero_1": [0], "one_1": [1], "two_1": [2], "minus_one_1": [-1]},
        **{"kv_heads": spec.kv_heads, "kv_heads_1": [spec.kv_heads], "group_1": [group]},
        **{"q_split": [0, spec.heads, -1], "kv_split": [0, spec.kv_heads, -1]},
        **{"group_split": [0, spec.kv_heads, group, -1], "sink_shape": [spec.kv_heads, group, 1, 1]},
        **{"turn_1": [start], "middle_1": [start + half], "turned_1": [start + 2 * half]},
        **{"scale": float(spec.scale), "softcap": float(spec.softcap), "window": spec.window, "chunk": spec.chunk},
        **{"value_dim_1": [spec.value_dim], "v_epsilon": float(spec.epsilon)},
    }
    outputs = ["y", "key_cache_out"] + ([] if spec.value_in_key else ["value_cache_out"])
    return function(PAGED_ATTENTION, spec, list(INPUTS[: len(present)]), outputs, constants, text)


def inputs_of(node: ir.Node) -> Inputs:
    """The inputs of a PagedAttention node by name."""
    return Inputs(*node.inputs)


def caches(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Each cache of a PagedAttention node as it goes in and as it comes out."""
    inputs = inputs_of(node)
    given = [value for value in (inputs.key_cache, inputs.value_cache) if value is not None]
    return list(zip(given, node.outputs[1:], strict=True))


register(Op(PAGED_ATTENTION, AttentionSpec, paged_attention_function, "paged_attention"))
