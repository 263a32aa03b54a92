"""Queries, the rows of a matrix tile, against a block of keys and values in a page: the inside of attention's loops."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.codes import decode_codes
from moevlm.plugins.gpu.kernels.attention.pages import load_rows, load_scales
from moevlm.plugins.gpu.kernels.attention.softmax import include, scores_of


@triton.jit
def multiply(a, b, acc, INTERPRETED: tl.constexpr):
    """a times b, plus acc, in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def as_operand(stored, dtype: tl.constexpr, H: tl.constexpr):
    """Rows of a cache as numbers, without their scales; codes in `dtype`."""
    if H.cache == "":
        value = stored
    else:
        value = decode_codes(stored, dtype, H)
    return value


@triton.jit
def attend_block(
    query,  # [BM, H.first]
    query_rest,  # [BM, H.rest]
    top,  # [BM] float32
    total,  # [BM] float32
    acc,  # [BM, H.value_width] float32
    key_cache,
    value_cache,
    page,  # int64
    head,
    first,  # the first row in the page
    real,  # [BN]: which rows are read
    seen,  # [BM or 1, BN]: which scores count
    cut,  # whether some do not
    TILE: tl.constexpr,
    H: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """top, total and acc with the block's keys."""
    row = first + tl.arange(0, TILE.BN)
    place = page * H.kv_heads + head
    block = key_cache + place * H.key_block
    key = load_rows(block, row, real, 0, H.first, H.dim)
    product = tl.zeros([TILE.BM, TILE.BN], tl.float32)
    product = multiply(query, tl.trans(as_operand(key, query.dtype, H)), product, INTERPRETED)
    if H.rest > 0:
        rest = load_rows(block, row, real, H.first, H.rest, H.dim)
        product = multiply(query_rest, tl.trans(as_operand(rest, query.dtype, H)), product, INTERPRETED)
    if H.cache != "":
        factor = load_scales(block, row, real, H.dim, H)
        product *= factor[None, :]
    score = scores_of(product, H)
    if cut:  # few blocks are: a select for each score is a sixth of what is done with it
        score = tl.where(seen, score, float("-inf"))
    power, top, total, shrink = include(score, top, total)
    if H.value_in_key and H.value_width == H.first:
        value = key
    elif H.value_in_key:
        value = load_rows(block, row, real, 0, H.value_width, H.dim)
    else:
        block = value_cache + place * H.value_block
        value = load_rows(block, row, real, 0, H.value_width, H.value_dim)
        if H.cache != "":
            factor = load_scales(block, row, real, H.value_dim, H)
    if H.cache != "":
        power *= factor[None, :]
        # Powers times scales would leave the range of float16.
        EXACT: tl.constexpr = INTERPRETED or not H.has_bfloat16 or query.dtype == tl.float32
        value = decode_codes(value, tl.float32 if EXACT else tl.bfloat16, H)
    if not INTERPRETED:
        power = power.to(value.dtype)
    return top, total, multiply(power, value, acc * shrink[:, None], INTERPRETED)
