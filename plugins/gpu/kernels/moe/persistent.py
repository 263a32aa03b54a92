"""Grouped products on SM90 and up that stay: as many programs as the GPU runs at once, each taking tile after tile.

Weights come by tensor maps, so no thread computes addresses for them; rows are gathered as elsewhere. A program's next
tile is read while its last one is finished.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.moe.grouped import block_rows, routed_rows
from moevlm.plugins.gpu.kernels.moe.products import finish_gate_up, inner_of, load_rows, multiply, store_tile
from moevlm.plugins.gpu.kernels.overlap import wait_for_previous


@triton.jit
def load_tile(w, e, row, column, TILE: tl.constexpr):
    """[BN, BK] of expert e of w, a tensor map; zeros beyond its edges."""
    return tl.reshape(w.load([e, row, column]), (TILE.BN, TILE.BK))


@triton.jit
def persistent_gate_up(
    x,  # [T, H]
    weight,  # [T, k] float32
    w,  # tensor map of [E, R, H], in blocks [1, BN, BK]
    bias,
    rows,  # [T * k] int32: rows by expert
    starts,  # [2, E + 1] int32
    blocks,  # [.., 2] int32
    inner,  # [T * k, I], written in the order of `rows`
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    INNER: tl.constexpr = inner_of(W, SPEC)
    TILES: tl.constexpr = (INNER + TILE.BN - 1) // TILE.BN
    STEPS: tl.constexpr = (W.width + TILE.BK - 1) // TILE.BK
    wait_for_previous(OVERLAPS)
    last = tl.load(starts + 2 * EXPERTS + 1) * TILES
    for tile in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=True):
        e, place, mask = block_rows(starts, blocks, tile // TILES, TILE.BM)
        row, factor = routed_rows(rows, weight, place, mask, SPEC, TILE.BM)
        first = tile % TILES * TILE.BN
        offset = (row // TOP_K).to(tl.int64) * W.width
        gate = tl.zeros([TILE.BM, TILE.BN], tl.float32)
        up = tl.zeros([TILE.BM, TILE.BN], tl.float32)
        for step in range(STEPS):
            part = load_rows(x, offset, mask, step, W, TILE.BK)
            gate = multiply(part, load_tile(w, e.to(tl.int32), first, step * TILE.BK, TILE), gate, INTERPRETED)
            if SPEC.gated:
                value = load_tile(w, e.to(tl.int32), INNER + first, step * TILE.BK, TILE)
                up = multiply(part, value, up, INTERPRETED)
        n = first + tl.arange(0, TILE.BN)
        out = finish_gate_up(gate, up, factor, bias, e, tl.minimum(n, INNER - 1), SPEC, W)
        store_tile(inner, place, n, out, mask, INNER)


@triton.jit
def persistent_down(
    inner,  # [T * k, I], in the order of `rows`
    w,  # tensor map of [E, H, I], in blocks [1, BN, BK]
    bias,
    rows,
    starts,
    blocks,
    out,  # [T * k, H], written in the order of `index`
    EXPERTS: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    TILES: tl.constexpr = (W.rows + TILE.BN - 1) // TILE.BN
    STEPS: tl.constexpr = (W.width + TILE.BK - 1) // TILE.BK
    wait_for_previous(OVERLAPS)
    last = tl.load(starts + 2 * EXPERTS + 1) * TILES
    for tile in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=True):
        e, place, mask = block_rows(starts, blocks, tile // TILES, TILE.BM)
        row = tl.load(rows + place, mask=mask, other=0)
        first = tile % TILES * TILE.BN
        offset = place.to(tl.int64) * W.width
        acc = tl.zeros([TILE.BM, TILE.BN], tl.float32)
        for step in range(STEPS):
            part = load_rows(inner, offset, mask, step, W, TILE.BK)
            acc = multiply(part, load_tile(w, e.to(tl.int32), first, step * TILE.BK, TILE), acc, INTERPRETED)
        n = first + tl.arange(0, TILE.BN)
        if W.has_bias:
            acc += tl.load(bias + e * W.rows + tl.minimum(n, W.rows - 1)).to(tl.float32)[None, :]
        store_tile(out, row, n, acc, mask, W.rows)
