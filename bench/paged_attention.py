"""Random calls of PagedAttention as GPUs have it: inputs, caches as numbers, and results held to the spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bench.visible_end import visible_ends
from moevlm.export.formats.base import rounded
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.ops.attention import attention

LARGEST_CODE = {"int8": 127, "fp8": 448}
Sequences = Sequence[tuple[int, int]]  # (tokens kept, tokens in the step) of each
Array = np.ndarray


def draw_inputs(op: PagedAttentionOp, sequences: Sequences, seed: int, shared: int = 0) -> dict[str, Array]:
    """Pages in random order, with NaN wherever nothing has been written, and -7 for pages that are not needed.

    shared: pages that the first two sequences have in common.
    """
    random, spec, page = np.random.default_rng(seed), op.spec, op.page_size
    contexts, lengths = zip(*sequences, strict=True)
    needed = [-(-(context + length) // page) for context, length in sequences]
    pages = 1 + sum(needed) + 2
    table = np.full((len(sequences), max(1, *needed) + 1), -7, np.int32)
    order = iter(1 + random.permutation(pages - 1))
    for n, count in enumerate(needed):
        table[n, :count] = [next(order) for _ in range(count)]
    table[1:2, :shared] = table[:1, :shared]
    written = np.zeros((pages, 1, page), bool)
    for n, context in enumerate(contexts):
        for i in range(-(-context // page)):
            written[table[n, i], :, : context - i * page] = True

    def cache(dim: int) -> Array:
        return packed(op, random.standard_normal((pages, spec.kv_heads, page, dim), np.float32), written)

    tokens = sum(lengths)
    angle = random.uniform(0, 6, (tokens, spec.rotary_dim // 2))
    inputs = {
        "qkv": random.standard_normal(op.inputs[0].at({"T": tokens})),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "key_cache": cache(op.key_dim),
        "value_cache": cache(op.value_dim),
        "query_start": np.cumsum([0, *lengths]).astype(np.int32),
        "context_len": np.array(contexts, np.int32),
        "page_table": table,
        "q_norm": random.uniform(0.5, 1.5, op.key_dim),
        "k_norm": random.uniform(0.5, 1.5, op.key_dim),
        "sinks": 2 * random.standard_normal(spec.heads),
        "visible_end": visible_ends(sequences, np.random.RandomState(seed), longest=40),
    }
    return {t.name: inputs[t.name] if "int" in t.dtype else rounded(inputs[t.name], t.dtype) for t in op.inputs}


def packed(op: PagedAttentionOp, rows: Array, written: Array) -> Array:
    """Rows [pages, kv_heads, page, D] as a cache holds them; garbage where they are not written [pages, 1, page]."""
    if not op.cache:
        return np.where(written[..., None], rows, np.nan)
    scale = np.abs(rows).max(-1) / LARGEST_CODE[op.cache]
    codes = np.rint(rows / scale[..., None])
    if op.cache == "fp8":
        codes = np.abs(codes)  # of e4m3, every bit pattern up to 7e is a number: which one does not matter here
        codes = np.minimum(codes, 0x7E)
    codes = np.where(written[..., None], codes, -1).astype(np.int8)
    scale = np.where(written, scale, np.nan).astype(np.float32)
    flat = [codes.reshape(*rows.shape[:2], -1), scale.view(np.int8).reshape(*rows.shape[:2], -1)]
    return np.concatenate(flat, -1).reshape(*rows.shape[:3], -1)


def numbers(op: PagedAttentionOp, cache: Array) -> Array:
    """A cache as float64 [pages, kv_heads, page, D]."""
    if not op.cache:
        return cache.astype(np.float64)
    pages, heads, page, width = cache.shape
    codes, scales = np.split(cache.reshape(pages, heads, -1), [page * (width - 4)], -1)
    values = _E4M3[codes.view(np.uint8)] if op.cache == "fp8" else codes.astype(np.float64)
    return values.reshape(pages, heads, page, -1) * np.ascontiguousarray(scales).view(np.float32)[..., None]


def _e4m3(code: int) -> float:
    exponent, digits = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return np.nan
    value = 2.0**-9 * digits if exponent == 0 else 2.0 ** (exponent - 7) * (1 + digits / 8)
    return -value if code & 0x80 else value


_E4M3 = np.array([_e4m3(code) for code in range(256)])


def deviation(op: PagedAttentionOp, inputs: Mapping[str, Array], results: Sequence[Array]) -> float:
    """How far y is from the reference, relative Frobenius norm; infinite if any of it is not a number.

    inputs: as they were before the call. results: y, and the caches after it. The reference attends to new keys and
    values as they were written, once those have been found right: rounding to eight bits is not held against the
    attention. Raises ValueError for caches that hold anything else.
    """
    y, *caches = results
    names = [t.name for t in op.inputs if t.written]
    before = {name: numbers(op, inputs[name]) for name in names}
    after = {name: numbers(op, cache) for name, cache in zip(names, caches, strict=True)}
    start, contexts = inputs["query_start"], inputs["context_len"]
    entries = [(n, contexts[n] + i) for n in range(len(contexts)) for i in range(start[n + 1] - start[n])]
    new = (
        np.array([inputs["page_table"][n, entry // op.page_size] for n, entry in entries], int),
        slice(None),
        np.array([entry % op.page_size for _, entry in entries], int),
    )
    written = iter([after[name][new] for name in names])

    def stored(rows: Array) -> Array:
        ours = next(written)
        far = ~(np.abs(ours - rows) <= _step(op, rows) * 0.505 + 1e-6 * np.abs(rows).max())
        if far.any():
            raise ValueError(f"{far.sum()} of {far.size} new keys or values are not the nearest that a cache can hold")
        return ours

    for name in names:
        kept = before[name].copy()
        kept[new] = after[name][new]
        if not np.array_equal(after[name], kept, equal_nan=True):
            raise ValueError(f"{name} was written where no new token lies")
        # What was not written stays NaN: the reference does not look at it, and neither may the kernels.
    spec = op.spec
    ends = np.cumsum([spec.heads * op.key_dim, spec.kv_heads * op.key_dim])
    q, k, v = np.split(inputs["qkv"].astype(np.float64), ends, axis=1)
    tables = [inputs.get(name) for name in ("cos", "sin")]
    indices = [inputs[name] for name in ("query_start", "context_len", "page_table")]
    optional = [inputs.get(name) for name in ("q_norm", "k_norm", "sinks")]
    value, end = v if spec.has_values else None, inputs.get("visible_end")
    want, *_ = attention(
        q, k, value, *tables, before["key_cache"], before.get("value_cache"), *indices, *optional, spec, stored, end
    )
    far = float(np.linalg.norm(y - want) / np.linalg.norm(want))
    return far if np.isfinite(far) else float("inf")


def _step(op: PagedAttentionOp, rows: Array) -> Array:
    """The distance of two neighbours around each value, as they are stored."""
    largest = np.abs(rows).max(-1, keepdims=True)
    if op.cache == "int8":
        return largest / 127
    if op.cache == "fp8":
        scale = largest / 448
        return scale * 2.0 ** (np.floor(np.log2(np.maximum(np.abs(rows) / scale, 2.0**-6))) - 3)
    digits = {"float32": 23, "float16": 10, "bfloat16": 6}[op.dtype]  # bfloat16 is cut off: as if it had one less
    return np.abs(rows) * 2.0**-digits + 1e-7
