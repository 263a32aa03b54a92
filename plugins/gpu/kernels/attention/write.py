"""New keys and values into their pages."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.codes import scale_of
from moevlm.plugins.gpu.kernels.attention.heads import load_heads, load_part
from moevlm.plugins.gpu.kernels.attention.pages import block_of, store_rows, store_scales
from moevlm.plugins.gpu.kernels.attention.sequences import clamped, page_of, sequence_of


@triton.jit
def write_heads(
    qkv,
    cos,
    sin,
    gain,  # of keys
    key_cache,
    value_cache,
    token,  # [rows] int32
    page,  # [rows] int64: the page of each token
    row,  # [rows] int32: its row there
    mask,  # [rows]: which are real
    writes,  # [rows]: which are written
    head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr,
    ROTARY_START: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    EPSILON: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Write one KV head of some tokens.

    Returns what the caches give back, float32: the key's two parts [rows, A] and [rows, B], of which the second is the
    first again if B is 0, and the value [rows, VALUE_WIDTH].
    """
    VALUES: tl.constexpr = 0 if VALUE_IN_KEY else VALUE_DIM
    QKV: tl.constexpr = (HEADS + KV_HEADS) * DIM + KV_HEADS * VALUES
    start = token.to(tl.int64) * QKV
    offset = start + (HEADS + head) * DIM
    block = block_of(key_cache, page, head, KV_HEADS, PAGE, DIM, CACHE)
    key = load_heads(qkv, offset, mask, token, cos, sin, gain, 0, A, DIM, A, B, ROTARY_START, HALF, HAS_NORMS, EPSILON)
    scale = tl.max(tl.abs(key), 1)
    if B > 0:
        rest = load_heads(
            qkv, offset, mask, token, cos, sin, gain, A, B, DIM, A, B, ROTARY_START, HALF, HAS_NORMS, EPSILON
        )
        scale = tl.maximum(scale, tl.max(tl.abs(rest), 1))
    scale = scale_of(scale, CACHE)
    if CACHE != "":
        store_scales(block, row, writes, scale, PAGE, DIM)
    key = store_rows(block, row, writes, key, scale, 0, A, DIM, CACHE, NATIVE_FP8)
    if B > 0:
        rest = store_rows(block, row, writes, rest, scale, A, B, DIM, CACHE, NATIVE_FP8)
    else:
        rest = key
    if VALUE_IN_KEY and VALUE_WIDTH == A:
        value = key
    elif VALUE_IN_KEY:
        value = load_heads(
            qkv, offset, mask, token, cos, sin, gain,
            0, VALUE_WIDTH, DIM, A, B, ROTARY_START, HALF, HAS_NORMS, EPSILON,
        )  # fmt: skip
        value = store_rows(block, row, writes, value, scale, 0, VALUE_WIDTH, DIM, CACHE, NATIVE_FP8)
    else:
        offset = start + (HEADS + KV_HEADS) * DIM + head * VALUE_DIM
        value = load_part(qkv, offset, mask, 0, VALUE_WIDTH, VALUE_DIM)
        block = block_of(value_cache, page, head, KV_HEADS, PAGE, VALUE_DIM, CACHE)
        scale = scale_of(tl.max(tl.abs(value), 1), CACHE)
        if CACHE != "":
            store_scales(block, row, writes, scale, PAGE, VALUE_DIM)
        value = store_rows(block, row, writes, value, scale, 0, VALUE_WIDTH, VALUE_DIM, CACHE, NATIVE_FP8)
    return key, rest, value


@triton.jit
def write_pages(
    qkv,  # [T, HEADS * DIM + KV_HEADS * DIM + KV_HEADS * VALUE_DIM]
    cos,  # [T, HALF] float32 or null
    sin,
    key_cache,  # [P, KV_HEADS, PAGE, DIM], or int8 codes and scales: written
    value_cache,
    query_start,  # [N + 1] int32
    context_len,  # [N] int32
    page_table,  # [N, M] int32
    k_norm,  # [DIM] float32 or null
    tokens,
    sequences,
    columns,
    pages,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr,
    ROTARY_START: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    EPSILON: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    PAGE: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program writes one KV head of STEP tokens."""
    place = tl.program_id(0) * STEP + tl.arange(0, STEP)
    mask = place < tokens
    token = tl.minimum(place, tokens - 1)
    sequence = sequence_of(query_start, token, sequences, 0)
    behind = token - tl.load(query_start + sequence)
    position = clamped(tl.load(context_len + sequence) + behind, 0, columns * PAGE - 1)
    page = page_of(page_table, sequence, position, columns, pages, PAGE)
    write_heads(
        qkv, cos, sin, k_norm, key_cache, value_cache, token, page, position % PAGE, mask, mask, tl.program_id(1),
        HEADS, KV_HEADS, DIM, A, B, VALUE_DIM, VALUE_WIDTH, VALUE_IN_KEY, ROTARY_START, HALF, HAS_NORMS, EPSILON,
        CACHE, NATIVE_FP8, PAGE,
    )  # fmt: skip
