"""Attention over pages of keys and values in numpy: the spec that every kernel, lowering and graph is held to.

Written to be read, not to be fast. Caches have their own dtype; everything else is float64, so that a deviation from
here is the other side's rounding.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from moevlm.plugins.ops.spec import AttentionSpec

Array = np.ndarray


def attention(
    q: Array,
    k: Array,
    v: Array | None,
    cos: Array | None,
    sin: Array | None,
    key_cache: Array,
    value_cache: Array | None,
    query_start: Array,
    context_len: Array,
    page_table: Array,
    q_norm: Array | None,
    k_norm: Array | None,
    sinks: Array | None,
    spec: AttentionSpec,
    stored: Callable[[Array], Array] = lambda rows: rows,
    visible_end: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Norm and rotate q and k, write k and v into their pages, attend over each sequence's pages.

    A token at position p sees the tokens of its sequence up to itself, and those behind it that `visible_end` says.

    q: [T, Hq * Dk]. k: [T, Hkv * Dk]. v: [T, Hkv * Dv], None where the value is in the key or is the key.
    cos, sin: [T, rotary_dim / 2], None where rotary_dim is 0.
    key_cache: [pages, Hkv, page, Dk]. value_cache: [pages, Hkv, page, Dv], or None.
    query_start: [N + 1], sequence n has the rows query_start[n] to query_start[n + 1], the first of them at position
    context_len[n]. page_table: [N, M]; position p lies in page page_table[n, p // page], row p % page.
    q_norm, k_norm: [Dk], gains of an RMS norm of each head, before the rotation; both or neither.
    sinks: [Hq], a logit of each head that takes part in the softmax and has no value (gpt-oss).
    stored: applied to keys and values [T, Hkv, D] on their way into the caches.
    visible_end: [T], where what a token sees ends, exclusive, as a position of its sequence: the end of its image where
    the tokens of an image see each other (Gemma 4), p + 1 for text. What is below p + 1 counts as that, and what is
    beyond the sequence's tokens in this step as their end. A window or a chunk limits what lies before a token, as
    ever.
    Returns y [T, Hq * Dv] in the dtype of q, and new caches.
    """
    tokens, page, dtype = len(q), key_cache.shape[2], q.dtype
    q = q.reshape(tokens, spec.heads, -1).astype(np.float64)
    k = k.reshape(tokens, spec.kv_heads, -1).astype(np.float64)
    values = k if v is None else v.reshape(tokens, spec.kv_heads, -1).astype(np.float64)
    if spec.value_norm:
        values = rms_norm(values, np.ones(1), spec.epsilon)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, spec.epsilon), rms_norm(k, k_norm, spec.epsilon)
    if spec.rotary_dim:
        assert cos is not None and sin is not None
        q, k = (rotate(x, cos, sin, spec.rotary_start) for x in (q, k))
    key_cache = key_cache.copy()
    value_cache = None if value_cache is None else value_cache.copy()

    position = np.zeros(tokens, np.int64)
    pages = np.zeros(tokens, np.int64)
    for n, rows in enumerate(_rows(query_start)):
        position[rows] = context_len[n] + np.arange(rows.stop - rows.start)
        pages[rows] = page_table[n, position[rows] // page]
    key_cache[pages, :, position % page] = stored(k.astype(key_cache.dtype))
    if value_cache is not None:
        value_cache[pages, :, position % page] = stored(values.astype(value_cache.dtype))

    y = []
    for n, rows in enumerate(_rows(query_start)):
        keys = _read(key_cache, page_table[n], context_len[n] + rows.stop - rows.start)
        values = keys[..., : spec.value_dim] if value_cache is None else _read(value_cache, page_table[n], len(keys[0]))
        end = position[rows] + 1
        if visible_end is not None:
            end = np.maximum(end, visible_end[rows])
        y.append(_attend(q[rows], keys, values, position[rows], end, sinks, spec))
    return np.concatenate(y).astype(dtype), key_cache, value_cache


def rms_norm(x: Array, gain: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x**2) + epsilon) * gain over the last axis (Zhang and Sennrich 2019)."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * gain


def rotate(x: Array, cos: Array, sin: Array, start: int = 0) -> Array:
    """x [T, heads, D]: the dimensions from `start` turn as two halves (RoFormer, in GPT-NeoX's pairing).

    cos, sin: [T, R / 2]; R dimensions turn, the others stay.
    """
    half = cos.shape[-1]
    before, a, b, rest = np.split(x, [start, start + half, start + 2 * half], axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([before, a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _rows(query_start: Array) -> list[slice]:
    return [slice(int(start), int(stop)) for start, stop in pairwise(query_start)]


def _read(cache: Array, pages: Array, length: int) -> Array:
    """The first `length` tokens of one sequence, [Hkv, length, D] float64."""
    used = cache[pages[: -(-length // cache.shape[2])]]
    return used.swapaxes(0, 1).reshape(cache.shape[1], -1, cache.shape[3])[:, :length].astype(np.float64)


def _attend(
    q: Array, keys: Array, values: Array, position: Array, end: Array, sinks: Array | None, spec: AttentionSpec
) -> Array:
    """One sequence: q [S, Hq, Dk] at `position` [S], keys [Hkv, C, Dk], values [Hkv, C, Dv] -> [S, Hq * Dv].

    end: [S], where the keys end that each query sees.
    """
    group = spec.heads // spec.kv_heads
    grouped = q.reshape(len(q), spec.kv_heads, group, q.shape[-1]).transpose(1, 2, 0, 3)  # [Hkv, group, S, Dk]
    scores = grouped @ keys[:, None].swapaxes(2, 3) * (spec.scale or q.shape[-1] ** -0.5)
    if spec.softcap:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    key_position = np.arange(keys.shape[1])
    seen = key_position < end[:, None]
    if spec.window:
        seen &= position[:, None] - key_position < spec.window
    if spec.chunk:
        seen &= key_position >= (position // spec.chunk * spec.chunk)[:, None]
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    total = 0.0
    if sinks is not None:
        sink = sinks.astype(np.float64).reshape(spec.kv_heads, group, 1, 1)
        top = np.maximum(top, sink)
        total = np.exp(sink - top)
    weights = np.exp(scores - top)
    y = weights / (weights.sum(axis=-1, keepdims=True) + total) @ values[:, None]
    return y.transpose(2, 0, 1, 3).reshape(len(q), spec.heads * values.shape[-1])


def segment_attention(
    q: Array, k: Array, v: Array, cos: Array | None, sin: Array | None, image_start: Array, heads: int
) -> Array:
    """Attention among the patches of each image, with rotary embedding where there are tables of it.

    q, k, v: [P, heads * D]. cos, sin: [P, D / 2], or neither. image_start: [images + 1], image i has the patches
    image_start[i] to image_start[i + 1]. Returns y [P, heads * D] in the dtype of q.
    """
    split = [x.reshape(len(x), heads, -1).astype(np.float64) for x in (q, k, v)]
    if cos is not None and sin is not None:
        split[:2] = (rotate(x, cos, sin) for x in split[:2])
    split = [x.swapaxes(0, 1) for x in split]
    y = np.zeros(q.shape)
    for rows in _rows(image_start):
        y[rows] = _among(*(x[:, rows] for x in split))
    return y.astype(q.dtype)


def cross_attention(q: Array, k: Array, v: Array, image_start: Array, heads: int) -> Array:
    """The same queries attend to the patches of each image, of which it has one at least (a resampler's queries).

    q: [queries, heads * D]. k, v: [P, heads * D]. image_start: [images + 1], as in `segment_attention`.
    Returns y [images, queries, heads * D] in the dtype of q.
    """
    dim = q.shape[1] // heads
    queries, keys, values = (x.reshape(len(x), heads, dim).astype(np.float64).swapaxes(0, 1) for x in (q, k, v))
    y = np.zeros((len(image_start) - 1, *q.shape))
    for image, rows in enumerate(_rows(image_start)):
        y[image] = _among(queries, keys[:, rows], values[:, rows])
    return y.astype(q.dtype)


def _among(queries: Array, keys: Array, values: Array) -> Array:
    """queries [heads, S, D], keys, values [heads, C, D] -> [S, heads * D]: every query sees every key."""
    scores = queries @ keys.swapaxes(1, 2) * keys.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    y = weights / weights.sum(axis=-1, keepdims=True) @ values
    return y.swapaxes(0, 1).reshape(queries.shape[1], len(queries) * values.shape[-1])
