"""Attention of single tokens: keys and values are read once, by programs that each walk a share of the sequence.

The program of the last share norms, rotates and writes the new key and value too, and attends to them without reading
them back. A token's predecessors in the same step are computed again by its own program, so none waits for another's.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import attend_block
from moevlm.plugins.gpu.kernels.attention.queries import load_queries, rows_of, store_results
from moevlm.plugins.gpu.kernels.attention.sequences import clamped, page_of, sequence_of
from moevlm.plugins.gpu.kernels.attention.softmax import LOG2_E, LOWEST, include, scores_of
from moevlm.plugins.gpu.kernels.attention.write import write_heads


@triton.jit
def store_state(states, place, top, total, mask, HEADS: tl.constexpr):
    """A share's top and total of each row; place: [BM], where they are in [places, shares, HEADS]."""
    tl.store(states + place, top, mask=mask)
    tl.store(states + tl.num_programs(0) * tl.num_programs(2) * HEADS + place, total, mask=mask)


@triton.jit
def decode(
    qkv,  # [T, HEADS * DIM + KV_HEADS * DIM + KV_HEADS * VALUE_DIM]
    cos,  # [T, HALF] float32 or null
    sin,
    key_cache,  # [P, KV_HEADS, PAGE, DIM], or int8 codes and scales: written
    value_cache,
    query_start,  # [N + 1] int32
    context_len,  # [N] int32
    page_table,  # [N, M] int32
    q_norm,  # [DIM] float32 or null
    k_norm,
    sinks,  # [HEADS] float32 or null
    y,  # [T, HEADS * VALUE_DIM], written if there is one share
    sums,  # [places, shares, HEADS, VALUE_DIM] float32, written if there are several: sums of values
    states,  # [2, places, shares, HEADS] float32: their tops and totals
    tokens,
    sequences,
    columns,
    pages,
    BY_SEQUENCE: tl.constexpr,
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
    HAS_SINKS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    LINES: tl.constexpr,
    SHARE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Programs: (token, or sequence; KV head and tile; share). A share is at least SHARE blocks of BN keys.

    BY_SEQUENCE: a program takes the only token of its sequence, and none of a sequence that has another number.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (GROUP + LINES - 1) // LINES
    place, slot, share, shares = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    if BY_SEQUENCE:
        n = place
        start = tl.load(query_start + n)
        if tl.load(query_start + n + 1) - start != 1:
            return
        token = clamped(start, 0, tokens - 1)
        first = token
    else:
        token = place
        n = tl.minimum(token, sequences - 1)
        first = tl.load(query_start + n)
        if (first > token) | (tl.load(query_start + n + 1) <= token):
            n = sequence_of(query_start, token, sequences, 0)
            first = tl.load(query_start + n)
        first = clamped(first, 0, token)
    context = clamped(tl.load(context_len + n), 0, columns * PAGE)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(context + token - first + 1 - WINDOW, 0)
    blocks = (context + BN - 1) // BN - oldest // BN
    length = tl.maximum((blocks + shares - 1) // shares, SHARE)
    block = oldest // BN + share * length
    stop = tl.minimum(block + length, (context + BN - 1) // BN)
    query_head, row_token, mask = rows_of(slot, token, token + 1, GROUP, LINES, BM)
    state = (place * shares + share) * HEADS + query_head
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, VALUE_WIDTH], tl.float32)
    if (block >= stop) & (share < shares - 1):
        store_state(states, state, top, total, mask, HEADS)
        return
    query, rest = load_queries(
        qkv, cos, sin, q_norm, query_head, row_token, mask,
        HEADS, KV_HEADS, DIM, A, B, VALUE_DIM, VALUE_IN_KEY, ROTARY_START, HALF, HAS_NORMS, EPSILON, INTERPRETED,
    )  # fmt: skip
    head = slot // TILES
    if share == shares - 1:
        if HAS_SINKS:
            top = tl.load(sinks + query_head, mask=mask, other=0.0) * LOG2_E
            total = tl.full([BM], 1.0, tl.float32)
        written = tl.where(slot % TILES == 0, token, -1)  # by the first tile of the KV head
        for new in range(first, token + 1):
            one = new + tl.zeros([1], tl.int32)
            position = clamped(context + one - first, 0, columns * PAGE - 1)
            key, key_rest, value = write_heads(
                qkv, cos, sin, k_norm, key_cache, value_cache,
                one, page_of(page_table, n, position, columns, pages, PAGE), position % PAGE,
                one >= 0, one == written, head,
                HEADS, KV_HEADS, DIM, A, B, VALUE_DIM, VALUE_WIDTH, VALUE_IN_KEY, ROTARY_START, HALF, HAS_NORMS,
                EPSILON, CACHE, NATIVE_FP8, PAGE,
            )  # fmt: skip
            product = tl.sum(query.to(tl.float32) * key, 1)
            if B > 0:
                product += tl.sum(rest.to(tl.float32) * key_rest, 1)
            score = scores_of(product, SCALE, SOFTCAP)[:, None]
            if WINDOW > 0:
                score = tl.where(token - new < WINDOW, score, float("-inf"))
            power, top, total, shrink = include(score, top, total)
            acc = acc * shrink[:, None] + power * value
    # The page of a block is read one block ahead: keys that wait for it would be copied ahead less far.
    page = page_of(page_table, n, block * BN, columns, pages, PAGE)
    for i in range(block, stop):
        following = page_of(page_table, n, (i + 1) * BN, columns, pages, PAGE)
        position = i * BN + tl.arange(0, BN)
        real = (position >= oldest) & (position < context)
        top, total, acc = attend_block(
            query, rest, top, total, acc, key_cache, value_cache, page, head, i * BN % PAGE, real, real[None, :],
            KV_HEADS, DIM, A, B, VALUE_DIM, VALUE_WIDTH, VALUE_IN_KEY, SCALE, SOFTCAP, CACHE, NATIVE_FP8, WIDE,
            PAGE, BM, BN, True, INTERPRETED,
        )  # fmt: skip
        page = following
    if shares == 1:
        store_results(y, acc, total, query_head, row_token, mask, HEADS, VALUE_DIM, VALUE_WIDTH)
    else:
        store_state(states, state, top, total, mask, HEADS)
        d = tl.arange(0, VALUE_WIDTH)
        tl.store(
            sums + state.to(tl.int64)[:, None] * VALUE_DIM + d[None, :],
            acc,
            mask=mask[:, None] & (d < VALUE_DIM)[None, :],
        )
