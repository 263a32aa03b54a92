"""Attention of many tokens of a sequence: tiles of them walk its pages, the new ones too, which are already written.

A few tokens after many are few tiles: their keys are then cut into shares, as in `decode`.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import attend_block
from moevlm.plugins.gpu.kernels.attention.pages import page_of
from moevlm.plugins.gpu.kernels.attention.queries import lines_of, load_queries, rows_of, store_results, tiles_of
from moevlm.plugins.gpu.kernels.attention.seen import first_seen
from moevlm.plugins.gpu.kernels.attention.segments import clamped, rows_of_tile
from moevlm.plugins.gpu.kernels.attention.shares import store_state, store_sums
from moevlm.plugins.gpu.kernels.attention.softmax import start_rows
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def prefill(
    qkv,  # [T, H.row]
    cos,  # [T, H.half] float32 or null
    sin,
    key_cache,  # [P, H.kv_heads, H.page, H.dim], or int8 codes and scales
    value_cache,
    query_start,  # [N + 1] int32
    context_len,  # [N] int32
    page_table,  # [N, M] int32
    q_norm,  # [H.dim] float32 or null
    sinks,  # [H.heads] float32 or null
    visible_end,  # [T] int32 or null: the position where what a token sees ends
    y,  # [T, H.heads * H.value_dim], written if there is one share
    sums,  # [T, shares, H.heads, H.value_dim] float32, written if there are several: sums of values
    states,  # [2, T, shares, H.heads] float32: their tops and totals
    tokens,
    sequences,
    columns,
    pages,
    LEAST: tl.constexpr,
    TILE: tl.constexpr,
    H: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Programs: (tile of tokens; KV head and tile of its query heads; share). A share is at least LEAST blocks of keys.

    Sequences of one token are left out.
    """
    wait_for_previous(OVERLAPS)
    TOKENS: tl.constexpr = TILE.BM // lines_of(H, TILE)
    BN: tl.constexpr = TILE.BN
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last see the most keys
    slot, share, shares = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    n, start, end, first = rows_of_tile(query_start, tile, sequences, tokens, TOKENS)
    if (first >= end) | (end - start == 1):
        return
    stop = tl.minimum(first + TOKENS, end)
    before = clamped(tl.load(context_len + n), 0, columns * H.page) - start  # a token's position, less its number
    query_head, token, mask = rows_of(slot, first, stop, TILE, H)
    seen_end = before + token + 1
    newest = before + stop - 1
    if H.has_visible_end:
        told = tl.minimum(tl.load(visible_end + token, mask=mask, other=0), before + end)
        seen_end = tl.maximum(seen_end, told)
        newest = tl.maximum(newest, tl.max(told, 0) - 1)
    oldest = first_seen(before + first, H)
    blocks = newest // BN + 1 - oldest // BN
    length = tl.maximum((blocks + shares - 1) // shares, LEAST)
    block = oldest // BN + share * length
    end_block = tl.minimum(block + length, newest // BN + 1)
    state = (token * shares + share) * H.heads + query_head
    top, total = start_rows(sinks, query_head, mask, share == shares - 1, TILE.BM, H)
    if (block >= end_block) & (share < shares - 1):
        store_state(states, state, tokens, shares, top, total, mask, H)
        return
    query, rest = load_queries(qkv, cos, sin, q_norm, query_head, token, mask, H, INTERPRETED)
    acc = tl.zeros([TILE.BM, H.value_width], tl.float32)
    head = slot // tiles_of(H, TILE)
    # The page of a block is read one block ahead: keys that wait for it would be copied ahead less far.
    page = page_of(page_table, n, block * BN, columns, pages, H)
    for i in range(block, end_block):
        following = page_of(page_table, n, (i + 1) * BN, columns, pages, H)
        position = i * BN + tl.arange(0, BN)
        seen = position[None, :] < seen_end[:, None]
        cut = (i + 1) * BN > before + first + 1
        if H.window > 0 or H.chunk > 0:
            seen = seen & (position[None, :] >= first_seen(before + token, H)[:, None])
            cut = cut | (i * BN < first_seen(before + stop - 1, H))
        top, total, acc = attend_block(
            query, rest, top, total, acc, key_cache, value_cache, page, head, i * BN % H.page,
            (position >= oldest) & (position <= newest), seen, cut, TILE, H, INTERPRETED,
        )  # fmt: skip
        page = following
    if shares == 1:
        store_results(y, acc, total, query_head, token, mask, H)
    else:
        store_state(states, state, tokens, shares, top, total, mask, H)
        store_sums(sums, state, acc, mask, H)
