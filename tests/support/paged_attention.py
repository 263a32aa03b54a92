"""Random calls of moevlm.cpu::PagedAttention, the layout of its pages, and its outputs held to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from bench.visible_end import visible_ends
from moevlm.plugins.ops.attention import attention
from moevlm.plugins.ops.spec import AttentionSpec
from moevlm.runtime.backends import libraries as native

ONNX_TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8}
INPUTS = {  # in the operator's order; the types of the caches are a case's
    "qkv": (TensorProto.FLOAT, 2),
    "cos": (TensorProto.FLOAT, 2),
    "sin": (TensorProto.FLOAT, 2),
    "key_cache": (None, 4),
    "value_cache": (None, 4),
    "query_start": (TensorProto.INT32, 1),
    "context_len": (TensorProto.INT32, 1),
    "page_table": (TensorProto.INT32, 2),
    "q_norm": (TensorProto.FLOAT, 1),
    "k_norm": (TensorProto.FLOAT, 1),
    "sinks": (TensorProto.FLOAT, 1),
    "visible_end": (TensorProto.INT32, 1),
}
OPTIONAL = ("cos", "sin", "value_cache", "q_norm", "k_norm", "sinks", "visible_end")
STRIP = 16  # tokens whose keys lie transposed
Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """sequences: (tokens in the cache, new tokens) of each. shared: pages that the first two have in common.

    images: there are images, of up to `longest` tokens, all of which see each other.
    """

    sequences: tuple[tuple[int, int], ...] = ((10, 1),)
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    rotary_dim: int = 32
    rotary_start: int = 0
    scale: float = 0.0
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    value_in_key: bool = False
    value_is_key: bool = False
    value_norm: bool = False
    norm: bool = False
    sinks: bool = False
    images: bool = False
    epsilon: float = 1e-6
    dtype: str = "float32"
    page: int = 64
    shared: int = 0
    longest: int = 60
    threads: int = 2

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case, name)}
        return ",".join(f"{name}={value}" for name, value in changed.items()).replace(" ", "") or "default"

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.sequences)

    @property
    def attributes(self) -> dict[str, Any]:
        names = ("heads", "kv_heads", "rotary_dim", "rotary_start", "scale", "window", "chunk", "softcap", "epsilon")
        return {name: getattr(self, name) for name in names} | {
            "value_in_key": int(self.value_in_key),
            "value_is_key": int(self.value_is_key),
            "value_norm": int(self.value_norm),
            "value_dim": self.value_dim if self.value_in_key else 0,
        }

    @property
    def given(self) -> list[str]:
        """The inputs that a node of this case has; empty names for those in between that it has not."""
        absent = {"value_cache"} if self.value_in_key else set()
        absent |= {"cos", "sin"} if not self.rotary_dim else set()
        absent |= {"q_norm", "k_norm"} if not self.norm else set()
        absent |= {"sinks"} if not self.sinks else set()
        absent |= {"visible_end"} if not self.images else set()
        names = ["" if name in absent else name for name in INPUTS]
        return names[: max(i for i, name in enumerate(names) if name) + 1]

    @property
    def outputs(self) -> list[str]:
        return ["y", "key_cache_out"] + ["value_cache_out"] * (not self.value_in_key)


def session(case: Case, without: str = "", **attributes: Any) -> ort.InferenceSession:
    """Open in every dimension. without: an input whose name is left empty."""
    given = tuple("" if name == without else name for name in case.given)
    return _session(given, tuple(case.outputs), case.dtype, case.threads, tuple((case.attributes | attributes).items()))


@cache
def _session(
    given: tuple[str, ...],
    outputs: tuple[str, ...],
    dtype: str,
    threads: int,
    attributes: tuple[tuple[str, Any], ...],
) -> ort.InferenceSession:
    def info(name: str, kind: int | None, rank: int) -> Any:
        return helper.make_tensor_value_info(name, kind or ONNX_TYPES[dtype], [None] * rank)

    node = helper.make_node("PagedAttention", given, outputs, domain="moevlm.cpu", **dict(attributes))
    graph = helper.make_graph(
        [node],
        "attention",
        [info(name, *INPUTS[name]) for name in given if name],
        [info(name, TensorProto.FLOAT if name == "y" else None, 2 if name == "y" else 4) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moevlm.cpu", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.operators_path()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(case: Case, inputs: dict[str, Array]) -> dict[str, Array]:
    return dict(zip(case.outputs, session(case).run(None, inputs), strict=True))


def quantize(rows: Array) -> Array:
    """[..., D] -> [..., D + 4] int8: symmetric per row, and the row's scale."""
    scale = (np.abs(rows).max(-1, keepdims=True) / 127).astype(np.float32)
    values = np.rint(np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)).astype(np.int8)
    return np.concatenate([values, scale.view(np.int8)], axis=-1)


def dequantize(rows: Array) -> Array:
    if rows.dtype != np.int8:
        return rows.astype(np.float64)
    return rows[..., :-4] * np.ascontiguousarray(rows[..., -4:]).view(np.float32).astype(np.float64)


def _scale(dtype: np.dtype) -> int:
    return 4 if dtype == np.int8 else 0


def to_pool(rows: Array, keys: bool) -> Array:
    """Rows [pages, kv_heads, page, D] (or D + 4 int8) as the operator keeps them, in the same shape."""
    pages, heads, page, width = rows.shape
    dim = width - _scale(rows.dtype)
    strips = rows.reshape(pages, heads, page // STRIP, STRIP, width)
    body = strips[..., :dim].swapaxes(-1, -2) if keys else strips[..., :dim]
    parts = [part.reshape(*strips.shape[:3], -1) for part in (body, strips[..., dim:])]
    return np.concatenate(parts, axis=-1).reshape(rows.shape)


def to_rows(pool: Array, keys: bool) -> Array:
    """The inverse of to_pool."""
    pages, heads, page, width = pool.shape
    dim = width - _scale(pool.dtype)
    strips = pool.reshape(pages, heads, page // STRIP, STRIP * width)
    body, scale = np.split(strips, [STRIP * dim], axis=-1)
    body = body.reshape(*strips.shape[:3], dim, STRIP).swapaxes(-1, -2) if keys else body
    parts = [body.reshape(*strips.shape[:3], STRIP, dim), scale.reshape(*strips.shape[:3], STRIP, width - dim)]
    return np.concatenate(parts, axis=-1).reshape(pool.shape)


def sequence_rows(rows: Array, table: Array, count: int) -> Array:
    """Rows [pages, kv_heads, page, ...] of a sequence's first `count` entries: [count, kv_heads, ...]."""
    if count == 0:
        return rows[:0, :, 0]
    used = rows[table[: -(-count // rows.shape[2])]].swapaxes(1, 2)
    return used.reshape(-1, *used.shape[2:])[:count]


def make_inputs(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """Pages in random order, with NaN wherever nothing has been written."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    needed = [-(-(past + new) // case.page) for past, new in case.sequences]
    width = max([*needed, 1]) + 1
    pages = sum(needed) + 3
    order = list(rng.permutation(np.arange(1, pages)))
    table = np.full((len(needed), width), -7, np.int32)  # what is not used is not looked at
    for n, count in enumerate(needed):
        table[n, :count] = [order.pop() for _ in range(count)]
    if case.shared:
        table[1, : case.shared] = table[0, : case.shared]
    written = np.zeros((pages, case.page), bool)
    for n, (past, _) in enumerate(case.sequences):
        for i in range(-(-past // case.page)):
            written[table[n, i], : past - i * case.page] = True

    def pool(dim: int, keys: bool) -> Array:
        rows = normal(pages, case.kv_heads, case.page, dim)
        rows = quantize(rows) if case.dtype == "int8" else rows
        nan = np.full(rows.shape, np.nan, np.float32) if case.dtype == "float32" else np.full(rows.shape, -1, np.int8)
        return to_pool(np.where(written[:, None, :, None], rows, nan), keys)

    angle = rng.uniform(0, 6, (case.tokens, case.rotary_dim // 2))
    values = 0 if case.value_in_key or case.value_is_key else case.kv_heads * case.value_dim
    inputs = {
        "qkv": normal(case.tokens, (case.heads + case.kv_heads) * case.key_dim + values),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "key_cache": pool(case.key_dim, True),
        "value_cache": pool(case.value_dim, False),
        "query_start": np.cumsum([0] + [new for _, new in case.sequences], dtype=np.int32),
        "context_len": np.array([past for past, _ in case.sequences], np.int32),
        "page_table": table,
        "q_norm": normal(case.key_dim),
        "k_norm": normal(case.key_dim),
        "sinks": normal(case.heads) * 3,
        "visible_end": visible_ends(case.sequences, np.random.RandomState(rng.integers(2**31)), longest=case.longest),
    }
    return {name: inputs[name] for name in case.given if name}


def split(case: Case, inputs: dict[str, Array]) -> tuple[Array, Array, Array | None]:
    """q [T, Hq * Dk], k [T, Hkv * Dk] and v [T, Hkv * Dv], or None where it is in the key."""
    ends = np.cumsum([case.heads * case.key_dim, case.kv_heads * case.key_dim])
    q, k, v = np.split(inputs["qkv"], ends, axis=1)
    return q, k, None if case.value_in_key or case.value_is_key else v


def check(case: Case, inputs: dict[str, Array], outputs: dict[str, Array], tolerance: float = 4e-6) -> None:
    """Hold outputs to the spec's reference. It attends to the new keys and values as they were written, once they have
    been found right: rounding to int8 is not held against the attention.

    tolerance: of the largest result. Sums in float32 of up to some hundred products: the farthest of 1,300 random cases
    was 1.4e-6.
    """
    names = ["key_cache", "value_cache"][: 2 - case.value_in_key]
    before = {name: to_rows(inputs[name], name == "key_cache") for name in names}
    after = {name: to_rows(outputs[f"{name}_out"], name == "key_cache") for name in names}
    entries = [(n, past + i) for n, (past, new) in enumerate(case.sequences) for i in range(new)]
    pages = [inputs["page_table"][n, entry // case.page] for n, entry in entries]
    new = np.array(pages, int), slice(None), np.array([entry % case.page for _, entry in entries], int)
    written = iter([dequantize(after[name][new]) for name in names])

    def stored(rows: Array) -> Array:
        ours = next(written)
        # A value between two steps may be rounded to either.
        step = np.abs(rows).max(-1, keepdims=True) / 127 if case.dtype == "int8" else 0
        assert (np.abs(ours - rows) <= step * 0.5001 + 1e-6 * np.abs(rows).max()).all()
        return ours

    for name in names:
        before[name][new] = after[name][new]
        np.testing.assert_array_equal(after[name], before[name])  # nothing else was touched
    assert outputs["y"].shape == (case.tokens, case.heads * case.value_dim)
    if case.tokens == 0:
        return
    caches = [dequantize(before[name]) if name in before else None for name in ("key_cache", "value_cache")]
    indices = [inputs[name] for name in ("query_start", "context_len", "page_table")]
    tables = [inputs.get(name) for name in ("cos", "sin")]
    optional = [inputs.get(name) for name in ("q_norm", "k_norm", "sinks")]
    visible_end = inputs.get("visible_end")
    rows = [None if x is None else x.astype(np.float64) for x in split(case, inputs)]
    spec = AttentionSpec(**case.attributes)
    y, *_ = attention(*rows, *tables, *caches, *indices, *optional, spec, stored, visible_end)
    assert np.isfinite(outputs["y"]).all()
    assert np.abs(outputs["y"] - y).max() <= tolerance * np.abs(y).max()
