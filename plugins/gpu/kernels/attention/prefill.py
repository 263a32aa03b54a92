"""Attention of many tokens of a sequence: tiles of them walk its pages, the new ones too, which are already written.

Flash attention (Dao 2023): scores stay in the program. Blocks that every row sees whole are walked without a mask.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.blocks import attend_block
from moevlm.plugins.gpu.kernels.attention.queries import load_queries, rows_of, store_results
from moevlm.plugins.gpu.kernels.attention.sequences import clamped, page_of, sequence_of
from moevlm.plugins.gpu.kernels.attention.softmax import LOG2_E, LOWEST


@triton.jit
def walk(
    query,
    rest,
    top,
    total,
    acc,
    key_cache,
    value_cache,
    page_table,
    n,
    head,
    start,
    stop,
    oldest,  # the first position that a row sees
    newest,  # the last
    row_position,  # [BM]
    columns,
    pages,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_IN_KEY: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """top, total and acc with the blocks of keys from `start` to `stop`."""
    # The page of a block is read one block ahead: keys that wait for it would be copied ahead less far.
    page = page_of(page_table, n, start * BN, columns, pages, PAGE)
    for i in range(start, stop):
        following = page_of(page_table, n, (i + 1) * BN, columns, pages, PAGE)
        position = i * BN + tl.arange(0, BN)
        real = (position >= oldest) & (position <= newest)
        seen = position[None, :] <= row_position[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > row_position[:, None] - WINDOW)
        top, total, acc = attend_block(
            query, rest, top, total, acc, key_cache, value_cache, page, head, i * BN % PAGE, real, seen,
            KV_HEADS, DIM, A, B, VALUE_DIM, VALUE_WIDTH, VALUE_IN_KEY, SCALE, SOFTCAP, CACHE, NATIVE_FP8, WIDE,
            PAGE, BM, BN, MASKED, INTERPRETED,
        )  # fmt: skip
        page = following
    return top, total, acc


@triton.jit
def prefill(
    qkv,  # [T, HEADS * DIM + KV_HEADS * DIM + KV_HEADS * VALUE_DIM]
    cos,  # [T, HALF] float32 or null
    sin,
    key_cache,  # [P, KV_HEADS, PAGE, DIM], or int8 codes and scales
    value_cache,
    query_start,  # [N + 1] int32
    context_len,  # [N] int32
    page_table,  # [N, M] int32
    q_norm,  # [DIM] float32 or null
    sinks,  # [HEADS] float32 or null
    y,  # [T, HEADS * VALUE_DIM], written
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
    HAS_SINKS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    CACHE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    LINES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Programs: (tile of tokens; KV head and tile of its query heads). Sequences of one token are left out."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (GROUP + LINES - 1) // LINES
    TOKENS: tl.constexpr = BM // LINES
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last see the most keys
    slot = tl.program_id(1)
    n = sequence_of(query_start, tile, sequences, TOKENS)
    start = clamped(tl.load(query_start + n), 0, tokens)
    end = clamped(tl.load(query_start + n + 1), start, tokens)
    first = start + (tile - start // TOKENS - n) * TOKENS
    if (first < start) | (first >= end) | (end - start == 1):
        return
    stop = tl.minimum(first + TOKENS, end)
    context = clamped(tl.load(context_len + n), 0, columns * PAGE)
    before = context - start  # a token's position, less its number
    newest = before + stop - 1
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(before + first + 1 - WINDOW, 0)
    query_head, token, mask = rows_of(slot, first, stop, GROUP, LINES, BM)
    query, rest = load_queries(
        qkv, cos, sin, q_norm, query_head, token, mask,
        HEADS, KV_HEADS, DIM, A, B, VALUE_DIM, VALUE_IN_KEY, ROTARY_START, HALF, HAS_NORMS, EPSILON, INTERPRETED,
    )  # fmt: skip
    if HAS_SINKS:
        top = tl.load(sinks + query_head, mask=mask, other=0.0) * LOG2_E
        total = tl.full([BM], 1.0, tl.float32)
    else:
        top = tl.full([BM], LOWEST, tl.float32)
        total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, VALUE_WIDTH], tl.float32)
    edge, end_block = oldest // BN, newest // BN + 1
    whole = edge
    if WINDOW > 0:
        whole = clamped((newest + 1 - WINDOW + BN - 1) // BN, edge, end_block)
    diagonal = clamped((before + first + 1) // BN, whole, end_block)
    head = slot // TILES
    for part in tl.static_range(0 if WINDOW > 0 else 1, 3):
        top, total, acc = walk(
            query, rest, top, total, acc, key_cache, value_cache, page_table, n, head,
            edge if part == 0 else whole if part == 1 else diagonal,
            whole if part == 0 else diagonal if part == 1 else end_block,
            oldest, newest, before + token, columns, pages,
            KV_HEADS, DIM, A, B, VALUE_DIM, VALUE_WIDTH, VALUE_IN_KEY, SCALE, SOFTCAP, WINDOW, CACHE, NATIVE_FP8,
            WIDE, PAGE, BM, BN, part != 1, INTERPRETED,
        )  # fmt: skip
    store_results(y, acc, total, query_head, token, mask, HEADS, VALUE_DIM, VALUE_WIDTH)
