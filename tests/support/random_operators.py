"""Random nodes of the CPU operators in ONNX Runtime, a third of them not valid; run by test_sanitizers.py.

A process of its own, because a sanitizer ends it: python -m tests.support.random_operators LIBRARY EXAMPLES SEED. Each
example is printed before it runs, so that the last line says which one failed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from moevlm.export.formats import cpu_packing
from moevlm.plugins.ops import candidates as reference
from moevlm.plugins.ops.spec import ACTIVATIONS, SCORINGS, GatedDeltaSpec, attributes
from tests.support import cpu_gated_delta
from tests.support import paged_attention as attention
from tests.support.delta_variants import delta_inputs

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
TYPES |= {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}
SPECIAL = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 0.0]
OUT_OF_RANGE = [-1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, -(2**63)]


@dataclass
class Node:
    op: str
    attributes: dict[str, Any]
    inputs: dict[str, np.ndarray]  # in the operator's order
    outputs: dict[str, str]  # their types
    case: attention.Case | None = None

    @property
    def names(self) -> list[str]:
        """The node's inputs, with empty names where an optional one in between is left out."""
        return self.case.given if self.case else list(self.inputs)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in self.inputs.items())
        return f"{self.op} {self.attributes}: {shapes}"


def run(node: Node, library: str, threads: int) -> list[np.ndarray]:
    made = helper.make_node(node.op, node.names, list(node.outputs), domain="moevlm.cpu", **node.attributes)
    graph = helper.make_graph(
        [made],
        "graph",
        [
            helper.make_tensor_value_info(name, TYPES[array.dtype.name], [None] * array.ndim)
            for name, array in node.inputs.items()
        ],
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in node.outputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("moevlm.cpu", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # or what is behind an output is the arena's
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, node.inputs)


sizes = st.one_of(st.integers(1, 20), st.integers(20, 150), st.integers(150, 300))
rows = st.one_of(st.integers(0, 2), st.integers(3, 60))


@st.composite
def attentions(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    past = st.one_of(st.integers(0, 40), st.integers(230, 300))
    new = st.one_of(st.integers(0, 3), st.integers(4, 40), st.integers(90, 130))
    sequences = draw(st.lists(st.tuples(past, new), min_size=1, max_size=3).map(tuple))
    kv_heads, value_in_key = draw(st.integers(1, 3)), draw(st.booleans())
    key_dim = 2 * draw(st.integers(1, 288))
    if draw(st.booleans()):
        key_dim = -(-key_dim // 16) * 16
    value_dim = min(key_dim - (draw(st.integers(0, key_dim - 2)) // 16 * 16 if draw(st.booleans()) else 0), 512)
    heads = kv_heads * draw(st.one_of(st.just(1), st.integers(1, 20)))
    if heads * sum(count for _, count in sequences) * key_dim > 200_000:  # seconds under a sanitizer
        heads = kv_heads
    rotary_dim = 2 * draw(st.integers(0, key_dim // 2))
    case = attention.Case(
        sequences=sequences,
        heads=heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        rotary_dim=rotary_dim,
        rotary_start=draw(st.integers(0, key_dim - rotary_dim)),
        window=draw(st.sampled_from([0, 0, 1, 20, 250])),
        chunk=draw(st.sampled_from([0, 0, 1, 20, 250])),
        softcap=draw(st.sampled_from([0.0, 20.0])),
        value_in_key=value_in_key,
        value_is_key=not value_in_key and key_dim == value_dim and draw(st.booleans()),
        value_norm=not value_in_key and draw(st.booleans()),
        norm=draw(st.booleans()),
        sinks=draw(st.booleans()),
        images=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "int8"])),
        page=draw(st.sampled_from([16, 64, 80])),
    )
    outputs = {name: "float32" if name == "y" else case.dtype for name in case.outputs}
    return Node("PagedAttention", case.attributes, attention.make_inputs(case, rng), outputs, case=case)


@st.composite
def deltas(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    key_heads, key_dim, value_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 70)), 2 * draw(st.integers(1, 70))
    if draw(st.booleans()):
        key_dim, value_dim = (-(-dim // 16) * 16 for dim in (key_dim, value_dim))
    spec = GatedDeltaSpec(
        key_heads=key_heads,
        value_heads=key_heads * draw(st.integers(1, 3)),
        key_dim=key_dim,
        value_dim=value_dim,
        kernel=draw(st.integers(2, 16)),
        scale=draw(st.sampled_from([0.0, 0.5])),
    )
    lengths = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(4, 20), st.integers(60, 70)), max_size=3))
    inputs = cpu_gated_delta.packed(delta_inputs(spec, tuple(lengths), int(rng.integers(2**31))))
    return Node("GatedDelta", attributes(spec), inputs, dict.fromkeys(cpu_gated_delta.OUTPUTS, "float32"))


def packing(draw: st.DrawFn) -> dict[str, int]:
    kind = draw(st.sampled_from(["int4", "zeros", "fp4", "int8"]))
    size = {"bits": 8 if kind == "int8" else 4, "block_size": 16 * draw(st.integers(1, 16))}
    return size | {name: int(kind == name) for name in ("zeros", "fp4")}


def packed_bytes(n: int, k: int, packed: dict[str, int]) -> int:
    return cpu_packing.packed_bytes(n, k, packed["bits"], packed["block_size"], bool(packed["zeros"]))


@st.composite
def linears(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    n, k, tokens, packed = draw(sizes), draw(sizes), draw(rows), packing(draw)
    size = packed_bytes(n, k, packed)
    inputs = {"x": rng.standard_normal((tokens, k), np.float32), "weight": rng.integers(0, 256, size, np.uint8)}
    if draw(st.booleans()):
        inputs["bias"] = rng.standard_normal(n, np.float32)
    return Node("Linear", {"N": n, "K": k, **packed}, inputs, {"y": "float32"})


@st.composite
def float_linears(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    n, k, tokens = draw(sizes), draw(sizes), draw(rows)
    weight = rng.standard_normal((n, k), np.float32)
    inputs = {"x": rng.standard_normal((tokens, k), np.float32), "weight": cpu_packing.pack_floats(weight)}
    if draw(st.booleans()):
        inputs["bias"] = rng.standard_normal(n, np.float32)
    return Node("FloatLinear", {"N": n, "K": k}, inputs, {"y": "float32"})


@st.composite
def head_linears(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    heads, n, k, tokens, packed = draw(st.integers(1, 9)), draw(sizes), draw(sizes), draw(rows), packing(draw)
    weight = rng.integers(0, 256, (heads, packed_bytes(n, k, packed)), np.uint8)
    inputs = {"x": rng.standard_normal((tokens, heads * k), np.float32), "weight": weight}
    return Node("HeadLinear", {"heads": heads, "N": n, "K": k, **packed}, inputs, {"y": "float32"})


@st.composite
def banks(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    experts, hidden, width = draw(st.integers(1, 9)), draw(sizes), draw(sizes)
    tokens, top_k, packed = draw(rows), draw(st.integers(1, 4)), packing(draw)
    activation = draw(st.sampled_from(ACTIVATIONS))
    gated = int(activation == "swiglu_clamped" or draw(st.booleans()))
    up_rows = -(-width // 16) * 32 if gated else width
    up = packed_bytes(up_rows, hidden, packed)
    down = packed_bytes(hidden, width, packed)
    inputs = {
        "x": rng.standard_normal((tokens, hidden), np.float32),
        "index": rng.integers(draw(st.sampled_from([-1, 0])), experts, (tokens, top_k), np.int32),
        "weight": rng.standard_normal((tokens, top_k), np.float32),
        "gate_up": rng.integers(0, 256, (experts, up), np.uint8),
        "down": rng.integers(0, 256, (experts, down), np.uint8),
    }
    if draw(st.booleans()):
        inputs["gate_up_bias"] = rng.standard_normal((experts, width * (1 + gated)), np.float32)
        inputs["down_bias"] = rng.standard_normal((experts, hidden), np.float32)
    numbers = {name: draw(st.sampled_from([1.0, *SPECIAL])) for name in ("alpha", "limit")}
    attributes = {"hidden": hidden, "width": width, **packed, "activation": activation, "gated": gated}
    attributes |= {"weight_on": draw(st.sampled_from(["input", "output"])), **numbers}
    return Node("MoEExperts", attributes, inputs, {"y": "float32"})


@st.composite
def candidates(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    vocabulary = draw(st.one_of(sizes, st.integers(2000, 9000)))
    logits = rng.standard_normal((draw(rows), vocabulary), np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # many ties
    outputs = {"values": "float32", "ids": "int32", "log_sum_exp": "float32"}
    return Node("Candidates", {"count": draw(st.integers(1, min(vocabulary, 300)))}, {"logits": logits}, outputs)


@st.composite
def routers(draw: st.DrawFn, rng: np.random.Generator) -> Node:
    n_group, size = draw(st.integers(1, 12)), draw(st.integers(2, 40))
    topk_group = draw(st.integers(1, n_group))
    attributes = {
        "top_k": draw(st.integers(1, topk_group * size)),
        "scoring": draw(st.sampled_from(SCORINGS)),
        "renormalize": draw(st.integers(0, 1)),
        "n_group": n_group,
        "topk_group": topk_group,
        "group_score": draw(st.sampled_from(["max", "top2_sum"])),
    }
    inputs = {"logits": rng.standard_normal((draw(rows), n_group * size), np.float32)}
    if draw(st.booleans()):
        inputs["bias"] = rng.standard_normal(n_group * size, np.float32)
        if draw(st.booleans()):
            inputs["expert_scale"] = rng.standard_normal(n_group * size, np.float32)
    return Node("MoERouter", attributes, inputs, {"index": "int32", "weight": "float32"})


def poison(draw: st.DrawFn, rng: np.random.Generator, node: Node) -> None:
    """NaN, infinity or the like in some values of a float input, or in the scales of an int8 cache."""
    name = draw(st.sampled_from([name for name, array in node.inputs.items() if array.dtype in (np.float32, np.int8)]))
    array, keys = node.inputs[name], name == "key_cache"
    quantized = array.dtype == np.int8
    rows = attention.to_rows(array, keys) if quantized else array
    values = np.ascontiguousarray(rows[..., -4:]).view(np.float32) if quantized else rows
    values[rng.random(values.shape) < draw(st.sampled_from([0.01, 0.3, 1.0]))] = draw(st.sampled_from(SPECIAL))
    if quantized:
        rows[..., -4:] = values.view(np.int8)
        node.inputs[name] = attention.to_pool(rows, keys)


def break_attribute(draw: st.DrawFn, node: Node) -> bool:
    names = [name for name, value in node.attributes.items() if isinstance(value, int)]
    node.attributes[draw(st.sampled_from(names))] = draw(st.sampled_from(OUT_OF_RANGE))
    return True


def break_index(draw: st.DrawFn, node: Node) -> bool:
    """An expert, a page, a row or a length that there is not."""
    names = [name for name in ("index", "query_start", "context_len", "page_table", "state_row") if name in node.inputs]
    name = draw(st.sampled_from(names)) if names else ""
    array = node.inputs.get(name, np.zeros(0))
    places = list(np.ndindex(array.shape))
    if name == "page_table" and node.case:  # the last page of a sequence with new tokens: others may not be looked at
        lengths = enumerate(node.case.sequences)
        places = [(n, (past + new - 1) // node.case.page) for n, (past, new) in lengths if new]
    if not places:
        return break_attribute(draw, node)
    limits = np.iinfo(array.dtype)
    below = -2 if name == "index" else -1  # an index of -1 is no expert
    array[draw(st.sampled_from(places))] = draw(st.sampled_from([below, limits.min, limits.max]))
    return True


def break_shape(draw: st.DrawFn, node: Node) -> bool:
    """One axis more or less, or of another size: not always wrong. Huge ones are of tensors without elements."""
    name = draw(st.sampled_from(list(node.inputs)))
    array, shape = node.inputs[name], list(node.inputs[name].shape)
    axis = draw(st.integers(0, len(shape) - 1))
    kind = draw(st.sampled_from(["more", "less", "larger", "smaller", "empty", "huge"]))
    if kind == "more":
        shape.insert(axis, 1)
    elif kind == "less":
        del shape[axis]
    elif kind == "larger":
        shape[axis] += 1
    elif kind == "smaller":
        shape[axis] = max(shape[axis] - 1, 0)
    elif kind == "empty":
        shape[axis] = 0
    else:
        shape = [1] * len(shape)
        shape[axis] = 2 ** draw(st.integers(40, 60 - array.itemsize.bit_length()))
        shape[axis - 1 if len(shape) > 1 else axis] = 0
    node.inputs[name] = np.zeros(shape, array.dtype)
    return False


@st.composite
def nodes(draw: st.DrawFn) -> tuple[Node, bool, bool, int]:
    """A node; whether it must be refused; whether its results can be checked; and threads."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    make = draw(
        st.sampled_from(
            [attentions, attentions, deltas, linears, float_linears, head_linears, banks, routers, candidates]
        )
    )
    node, kind = draw(make(rng)), draw(st.integers(0, 8))
    refused = False
    if kind in (0, 1):
        poison(draw, rng, node)
    elif kind in (2, 3, 4):
        refused = [break_attribute, break_index, break_shape][kind - 2](draw, node)
    return node, refused, kind > 4, draw(st.sampled_from([1, 1, 2]))


def check(node: Node, outputs: list[np.ndarray]) -> None:
    if node.case is not None:
        attention.check(node.case, node.inputs, dict(zip(node.outputs, outputs, strict=True)))
    if node.op == "GatedDelta":
        spec = GatedDeltaSpec(**node.attributes)
        inputs = node.inputs | {"conv_weight": node.inputs["conv_weight"].T}
        cpu_gated_delta.check(spec, inputs, dict(zip(node.outputs, outputs, strict=True)))
    if node.op == "Candidates":
        values, ids, _ = reference.candidates(node.inputs["logits"], node.attributes["count"])
        np.testing.assert_array_equal(outputs[0], values)
        np.testing.assert_array_equal(outputs[1], ids)
    if node.op == "MoERouter":
        index = np.sort(outputs[0], axis=1)
        assert ((index >= 0) & (index < node.inputs["logits"].shape[1])).all()
        assert (np.diff(index, axis=1) > 0).all()


def main(library: str, examples: int, number: int) -> None:
    # Nothing is shrunk: the process does not survive what a sanitizer finds.
    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(nodes())
    def every_node_runs_or_is_refused(drawn: tuple[Node, bool, bool, int]) -> None:
        node, refused, checked, threads = drawn
        print(node, flush=True)
        try:
            outputs = run(node, library, threads)
        except Exception as error:
            assert f"{node.op}: " in str(error) or "ShapeInferenceError" in str(error), error
            assert not checked, error
        else:
            assert not refused
            if checked:
                check(node, outputs)

    every_node_runs_or_is_refused()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
