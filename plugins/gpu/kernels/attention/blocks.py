"""Queries, the rows of a matrix tile, against a block of keys and values in a page: the inside of attention's loops."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.codes import decode_codes
from moevlm.plugins.gpu.kernels.attention.pages import block_of, load_rows, load_scales
from moevlm.plugins.gpu.kernels.attention.softmax import include, scores_of


@triton.jit
def times(a, b, acc, INTERPRETED: tl.constexpr):
    """a times b, plus acc, in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def as_operand(stored, dtype: tl.constexpr, CACHE: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """Rows of a cache as numbers, without their scales."""
    if CACHE == "":
        value = stored
    else:
        value = decode_codes(stored, dtype, CACHE, NATIVE_FP8)
    return value


@triton.jit
def attend_block(
    query,  # [BM, A], in the dtype that products are computed in
    query_rest,  # [BM, B]
    top,  # [BM] float32
    total,  # [BM] float32
    acc,  # [BM, VALUE_WIDTH] float32
    key_cache,
    value_cache,
    page,  # int64
    head,
    first,  # the first row in the page
    real,  # [BN]: which rows are read
    seen,  # [BM or 1, BN]: which scores count
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """top, total and acc with the block's keys. Not MASKED: all rows are read and all scores count.

    WIDE: the dtype in which the values of codes are multiplied, "bfloat16" or "float32".
    """
    row = first + tl.arange(0, BN)
    block = block_of(key_cache, page, head, KV_HEADS, PAGE, DIM, CACHE)
    key = load_rows(block, row, real, 0, A, DIM, MASKED)
    factor = tl.full([BN], 1.0, tl.float32)
    if CACHE != "":
        factor = load_scales(block, row, real, PAGE, DIM, CACHE, NATIVE_FP8, MASKED)
    product = tl.zeros([BM, BN], tl.float32)
    product = times(query, tl.trans(as_operand(key, query.dtype, CACHE, NATIVE_FP8)), product, INTERPRETED)
    if B > 0:
        rest = load_rows(block, row, real, A, B, DIM, MASKED)
        rest = as_operand(rest, query.dtype, CACHE, NATIVE_FP8)
        product = times(query_rest, tl.trans(rest), product, INTERPRETED)
    if CACHE != "":
        product *= factor[None, :]
    score = scores_of(product, SCALE, SOFTCAP)
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    power, top, total, shrink = include(score, top, total)
    if VALUE_IN_KEY and VALUE_WIDTH == A:
        value = key
    elif VALUE_IN_KEY:
        value = load_rows(block, row, real, 0, VALUE_WIDTH, DIM, MASKED)
    else:
        block = block_of(value_cache, page, head, KV_HEADS, PAGE, VALUE_DIM, CACHE)
        value = load_rows(block, row, real, 0, VALUE_WIDTH, VALUE_DIM, MASKED)
        if CACHE != "":
            factor = load_scales(block, row, real, PAGE, VALUE_DIM, CACHE, NATIVE_FP8, MASKED)
    if CACHE != "":
        power *= factor[None, :]
        # Powers times scales would leave the range of float16.
        value = decode_codes(
            value, tl.bfloat16 if WIDE == "bfloat16" and not INTERPRETED else tl.float32, CACHE, NATIVE_FP8
        )
    if not INTERPRETED:
        power = power.to(value.dtype)
    return top, total, times(power, value, acc * shrink[:, None], INTERPRETED)
