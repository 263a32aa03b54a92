"""New keys and values into their pages."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.attention.codes import decode_codes, decoded_scale, encode, scale_of
from moevlm.plugins.gpu.kernels.attention.heads import load_heads, load_part
from moevlm.plugins.gpu.kernels.attention.pages import page_of, scales_of
from moevlm.plugins.gpu.kernels.attention.segments import clamped, segment_of
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def write_rows(
    block,  # pointers: where each row's block starts, [rows]
    row,  # [rows]: its place there
    writes,  # [rows]: which are written
    value,  # [rows, WIDTH] float32
    scale,  # [rows] float32, of codes
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    H: tl.constexpr,
):
    """Write WIDTH dimensions from FIRST on. Returns what the cache gives back: [rows, WIDTH] float32."""
    d = FIRST + tl.arange(0, WIDTH)
    if H.cache == "":
        stored = value.to(block.dtype.element_ty)
        given_back = stored.to(tl.float32)
    else:
        stored = encode(value, scale, H)
        given_back = decode_codes(stored, tl.float32, H) * decoded_scale(scale, H)[:, None]
    pointer = block[:, None] + (row[:, None] * DIM + d[None, :])
    tl.store(pointer, stored, mask=writes[:, None] & (d < DIM)[None, :])
    return given_back


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
    H: tl.constexpr,
):
    """Write one KV head of some tokens.

    Returns what the caches give back, float32: the key's two parts [rows, H.first] and [rows, H.rest], the second the
    first again where there is none, and the value [rows, H.value_width].
    """
    start = token.to(tl.int64) * H.row
    offset = start + (H.heads + head) * H.dim
    place = page * H.kv_heads + head
    block = key_cache + place * H.key_block
    key = load_heads(qkv, offset, mask, token, cos, sin, gain, 0, H.first, H)
    scale = tl.max(tl.abs(key), 1)
    if H.rest > 0:
        rest = load_heads(qkv, offset, mask, token, cos, sin, gain, H.first, H.rest, H)
        scale = tl.maximum(scale, tl.max(tl.abs(rest), 1))
    scale = scale_of(scale, H)
    if H.cache != "":
        tl.store(scales_of(block, H.dim, H) + row, scale, mask=writes)
    key = write_rows(block, row, writes, key, scale, 0, H.first, H.dim, H)
    if H.rest > 0:
        rest = write_rows(block, row, writes, rest, scale, H.first, H.rest, H.dim, H)
    else:
        rest = key
    if H.value_in_key and H.value_width == H.first:
        value = key
    elif H.value_in_key:
        value = load_heads(qkv, offset, mask, token, cos, sin, gain, 0, H.value_width, H)
        value = write_rows(block, row, writes, value, scale, 0, H.value_width, H.dim, H)
    else:
        if H.value_is_key == 0:
            offset = start + (H.heads + H.kv_heads) * H.dim + head * H.value_dim
        value = load_part(qkv, offset, mask, 0, H.value_width, H.value_dim)
        if H.value_norm:
            value *= tl.rsqrt(tl.sum(value * value, 1) / H.value_dim + H.epsilon)[:, None]
        block = value_cache + place * H.value_block
        scale = scale_of(tl.max(tl.abs(value), 1), H)
        if H.cache != "":
            tl.store(scales_of(block, H.value_dim, H) + row, scale, mask=writes)
        value = write_rows(block, row, writes, value, scale, 0, H.value_width, H.value_dim, H)
    return key, rest, value


@triton.jit
def write_pages(
    qkv,  # [T, H.row]
    cos,  # [T, H.half] float32 or null
    sin,
    key_cache,  # [P, H.kv_heads, H.page, H.dim], or int8 codes and scales: written
    value_cache,
    query_start,  # [N + 1] int32
    context_len,  # [N] int32
    page_table,  # [N, M] int32
    k_norm,  # [H.dim] float32 or null
    tokens,
    sequences,
    columns,
    pages,
    H: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program writes one KV head of STEP tokens."""
    wait_for_previous(OVERLAPS)
    place = tl.program_id(0) * STEP + tl.arange(0, STEP)
    mask = place < tokens
    token = tl.minimum(place, tokens - 1)
    sequence = segment_of(query_start, token, sequences, 0)
    behind = token - tl.load(query_start + sequence)
    position = clamped(tl.load(context_len + sequence) + behind, 0, columns * H.page - 1)
    page = page_of(page_table, sequence, position, columns, pages, H)
    head = tl.program_id(1)
    write_heads(qkv, cos, sin, k_norm, key_cache, value_cache, token, page, position % H.page, mask, mask, head, H)
