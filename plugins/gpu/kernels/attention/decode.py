"""Attention of single tokens: keys and values are read once, by programs that each walk a share of the sequence.

The program of the last share norms, rotates and writes the new key and value too, and attends to them without reading
them back. Those of other tokens of the same step are computed again by a token's own program, so none waits for
another's.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import attend_block
from moevlm.plugins.gpu.kernels.attention.pages import page_of
from moevlm.plugins.gpu.kernels.attention.queries import load_queries, rows_of, tiles_of
from moevlm.plugins.gpu.kernels.attention.seen import first_seen
from moevlm.plugins.gpu.kernels.attention.segments import clamped, segment_of
from moevlm.plugins.gpu.kernels.attention.shares import store_state, store_sums
from moevlm.plugins.gpu.kernels.attention.softmax import include, scores_of, start_rows
from moevlm.plugins.gpu.kernels.attention.write import write_heads
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def decode(
    qkv,  # [T, H.row]
    cos,  # [T, H.half] float32 or null
    sin,
    key_cache,  # [P, H.kv_heads, H.page, H.dim], or int8 codes and scales: written
    value_cache,
    query_start,  # [N + 1] int32
    context_len,  # [N] int32
    page_table,  # [N, M] int32
    q_norm,  # [H.dim] float32 or null
    k_norm,
    sinks,  # [H.heads] float32 or null
    visible_end,  # [T] int32 or null: the position where what a token sees ends
    sums,  # [places, shares, H.heads, H.value_dim] float32, written: sums of values
    states,  # [2, places, shares, H.heads] float32, written: their tops and totals
    tokens,
    sequences,
    columns,
    pages,
    longest,
    least,
    BY_SEQUENCE: tl.constexpr,
    TILE: tl.constexpr,
    H: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Programs: (token, or sequence; KV head and tile; share). A share is at least `least` blocks of keys.

    Sequences that have more than `longest` tokens are left out. BY_SEQUENCE: a program takes the only token of its
    sequence, and none of a sequence that has another number.
    """
    wait_for_previous(OVERLAPS)
    TILES: tl.constexpr = tiles_of(H, TILE)
    BN: tl.constexpr = TILE.BN
    place, slot, share, shares = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    if BY_SEQUENCE:
        n = place
        start = tl.load(query_start + n)
        if tl.load(query_start + n + 1) - start != 1:
            return
        token = clamped(start, 0, tokens - 1)
        first = token
        stop_new = token + 1
    else:
        token = place
        n = tl.minimum(token, sequences - 1)
        first, end = tl.load(query_start + n), tl.load(query_start + n + 1)
        if (first > token) | (end <= token):
            n = segment_of(query_start, token, sequences, 0)
            first, end = tl.load(query_start + n), tl.load(query_start + n + 1)
        if end - first > longest:
            return
        stop_new = token + 1
        if H.has_visible_end:  # told as a position; so many tokens of the step are those up to it
            told = tl.load(visible_end + token) - tl.maximum(tl.load(context_len + n), 0)
            stop_new = clamped(tl.minimum(told, tokens) + first, stop_new, clamped(end, stop_new, tokens))
        first = clamped(first, tl.maximum(token + 1 - longest, 0), token)
    context = clamped(tl.load(context_len + n), 0, columns * H.page)
    oldest = first_seen(context + token - first, H)
    blocks = (context + BN - 1) // BN - oldest // BN
    length = tl.maximum((blocks + shares - 1) // shares, least)
    block = oldest // BN + share * length
    stop = tl.minimum(block + length, (context + BN - 1) // BN)
    query_head, row_token, mask = rows_of(slot, token, token + 1, TILE, H)
    state = (place * shares + share) * H.heads + query_head
    is_last = share == shares - 1
    top, total = start_rows(sinks, query_head, mask, is_last, TILE.BM, H)
    if (block >= stop) & (share < shares - 1):
        store_state(states, state, tl.num_programs(0), shares, top, total, mask, H)
        return
    query, rest = load_queries(qkv, cos, sin, q_norm, query_head, row_token, mask, H, INTERPRETED)
    acc = tl.zeros([TILE.BM, H.value_width], tl.float32)
    head = slot // TILES
    if is_last:
        written = tl.where(slot % TILES == 0, token, -1)  # by the first tile of the KV head
        for new in range(tl.maximum(first, first + oldest - context), stop_new):
            position = clamped(context + new - first, 0, columns * H.page - 1)
            page = page_of(page_table, n, position, columns, pages, H)
            one = tl.zeros([1], tl.int32)
            key, key_rest, value = write_heads(
                qkv, cos, sin, k_norm, key_cache, value_cache,
                one + new, one + page, one + position % H.page, one == 0, one + new == written, head, H,
            )  # fmt: skip
            product = tl.sum(query.to(tl.float32) * key, 1)
            if H.rest > 0:
                product += tl.sum(rest.to(tl.float32) * key_rest, 1)
            score = scores_of(product, H)[:, None]
            power, top, total, shrink = include(score, top, total)
            acc = acc * shrink[:, None] + power * value
    # The page of a block is read one block ahead: keys that wait for it would be copied ahead less far.
    page = page_of(page_table, n, block * BN, columns, pages, H)
    for i in range(block, stop):
        following = page_of(page_table, n, (i + 1) * BN, columns, pages, H)
        position = i * BN + tl.arange(0, BN)
        real = (position >= oldest) & (position < context)
        cut = (i * BN < oldest) | ((i + 1) * BN > context)
        top, total, acc = attend_block(
            query, rest, top, total, acc, key_cache, value_cache, page, head, i * BN % H.page,
            real, real[None, :], cut, TILE, H, INTERPRETED,
        )  # fmt: skip
        page = following
    store_state(states, state, tl.num_programs(0), shares, top, total, mask, H)
    store_sums(sums, state, acc, mask, H)
