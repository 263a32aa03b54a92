"""Weights in the formats that quantized checkpoints are published in, written from the formats' definitions.

Codes come first; the numbers that they stand for are computed from them, one tile or group at a time. A writer takes a
weight [N, K] (or [E, N, K] where its layout is fused) and gives the tensors, by the endings of their names, and the
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Writer = Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = [
    (-1) ** (c >> 3) * ((c & 1) * 0.5 if not c >> 1 & 3 else (1 + (c & 1) / 2) * 2 ** ((c >> 1 & 3) - 1))
    for c in range(16)
]


def _pieces(size: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, size)) for i in range(0, size, step))


def _each(writer: Writer) -> Writer:
    """The same for [E, N, K]: the tensors of all experts stacked."""

    def write(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        if w.ndim == 2:
            return writer(w)
        found = [writer(expert) for expert in w]
        return {name: torch.stack([t[name] for t, _ in found]) for name in found[0][0]}, np.stack([v for _, v in found])

    return write


def fp8_tiles(rows: int, columns: int, scale: str, dtype: torch.dtype = torch.bfloat16, shape: Any = None) -> Writer:
    """e4m3 codes, a multiplier `scale` for each rows x columns (0 for all). shape: of the scale, if not the grid's."""

    def write(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        n, k = w.shape
        high, wide = rows or n, columns or k
        largest = np.maximum.reduceat(np.abs(w), range(0, n, high), 0)
        grid = torch.from_numpy(np.maximum.reduceat(largest, range(0, k, wide), 1) / 448)
        if dtype is torch.uint8:  # the exponent of a power of two
            scales = (torch.ceil(torch.log2(grid)) + 127).to(dtype)
            multiplier = 2.0 ** (scales.double() - 127)
        else:
            scales = grid.to(dtype)
            multiplier = scales.double()
        each = multiplier.float().repeat_interleave(high, 0)[:n].repeat_interleave(wide, 1)[:, :k]
        codes = (torch.from_numpy(w) / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"": codes, scale: scales if shape is None else scales.reshape(shape)}, (codes.float() * each).numpy()

    return _each(write)


def int8_rows(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """compressed-tensors int-quantized: signed codes, a scale for each row."""
    scales = torch.from_numpy(np.abs(w).max(1, keepdims=True) / 127)
    codes = (torch.from_numpy(w) / scales).round().to(torch.int8)
    return {"": codes, "_scale": scales}, (codes.float() * scales).numpy()


def _integers(
    w: np.ndarray, group: int, zeros: bool, bits: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """codes [N, K], float16 scales and zeros [N, groups], values. Zeros: not 0, not the last code, or the middle."""
    n, k = w.shape
    last, middle = (1 << bits) - 1, 1 << (bits - 1)
    codes, values = np.empty((n, k), np.int64), np.empty_like(w)
    scales, points = [], []
    for j in _pieces(k, group):
        low, high = w[:, j].min(1), w[:, j].max(1)
        scale = ((high - low) / last if zeros else np.abs(w[:, j]).max(1) / (middle - 1)).astype(np.float16)
        zero = np.clip(np.rint(-low / scale), 1, last - 1).astype(np.int64) if zeros else np.full(n, middle)
        codes[:, j] = np.clip(np.rint(w[:, j] / scale[:, None]) + zero[:, None], 0, last)
        values[:, j] = (codes[:, j] - zero[:, None]).astype(np.float32) * scale.astype(np.float32)[:, None]
        scales.append(scale)
        points.append(zero)
    return codes, np.stack(scales, 1), np.stack(points, 1), values


def _words(codes: np.ndarray, bits: int = 4, order: tuple[int, ...] = ()) -> torch.Tensor:
    """codes [R, C] -> int32 [R, C * bits / 32]: part i of a word, from the lowest bits, is code order[i] of its own."""
    order = order or tuple(range(32 // bits))
    words = np.zeros((len(codes), codes.shape[1] // len(order)), np.uint32)
    for i, place in enumerate(order):
        words |= codes[:, place :: len(order)].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))


def packed_ints(group: int, zeros: bool = False, bits: int = 4) -> Writer:
    """compressed-tensors pack-quantized."""

    def write(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        codes, scales, points, values = _integers(w, group, zeros, bits)
        tensors = {
            "_packed": _words(codes, bits),
            "_scale": torch.from_numpy(scales).to(torch.bfloat16),
            "_shape": torch.tensor(w.shape),
        }
        exact = tensors["_scale"].float().repeat_interleave(group, 1).numpy()[:, : w.shape[1]]
        values = (codes - points.repeat(group, 1)[:, : w.shape[1]]).astype(np.float32) * exact
        return tensors | ({"_zero_point": _words(points.T, bits).T} if zeros else {}), values

    return _each(write)


def gptq(group: int, zeros: bool = False, act_order: bool = False, offset: int = 1, bits: int = 4) -> Writer:
    """act_order: the groups are scattered over the inputs. offset: 1, or 0 for gptq_v2."""

    def write(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        order = np.random.default_rng(w.size).permutation(w.shape[1]) if act_order else np.arange(w.shape[1])
        codes, scales, points, values = _integers(w[:, order], group, zeros, bits)
        group_of, back = np.arange(w.shape[1]) // group, np.argsort(order)
        tensors = {
            ".qweight": _words(codes[:, back], bits).T.contiguous(),
            ".scales": torch.from_numpy(scales.T.copy()),
            ".qzeros": _words(points.T - offset, bits),
            ".g_idx": torch.from_numpy(group_of[back].astype(np.int32)),
        }
        return tensors, values[:, back]

    return write


def awq(group: int) -> Writer:
    """Version gemm."""

    def write(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        codes, scales, points, values = _integers(w, group, zeros=True)
        return {
            ".qweight": _words(codes.T, 4, _AWQ_ORDER),
            ".qzeros": _words(points.T, 4, _AWQ_ORDER),
            ".scales": torch.from_numpy(scales.T.copy()),
        }, values

    return write


def _fp4(w: np.ndarray, multiplier: np.ndarray, group: int) -> tuple[torch.Tensor, np.ndarray]:
    """Codes of e2m1, the even columns in the low nibbles, and values. multiplier: [N, groups] float32."""
    each = multiplier.repeat(group, 1)
    codes = np.abs(w[..., None] / each[..., None] - np.array(_E2M1)).argmin(-1)
    return torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)), np.array(_E2M1, np.float32)[
        codes
    ] * each


def nvfp4(packed: str, scale: str, of_all: str, divides: bool) -> Writer:
    """packed, scale, of_all: endings. divides: compressed-tensors' inverse of the scale of all."""

    def write(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        whole = np.float32(np.abs(w).max() / (6 * 448))
        whole = np.float32(1) / whole if divides else whole
        blocks = np.abs(w).reshape(len(w), -1, 16).max(-1) / 6
        small = torch.from_numpy(blocks * whole if divides else blocks / whole).to(torch.float8_e4m3fn)
        multiplier = small.float().numpy() / whole if divides else small.float().numpy() * whole
        codes, values = _fp4(w, multiplier, 16)
        return {packed: codes, scale: small, of_all: torch.tensor(whole)}, values

    return _each(write)


def mxfp4(packed: str, scale: str) -> Writer:
    """Groups of 32 with an exponent."""

    def write(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        exponents = np.ceil(np.log2(np.abs(w).reshape(len(w), -1, 32).max(-1) / 6)).astype(int) + 127
        codes, values = _fp4(w, (2.0 ** (exponents - 127)).astype(np.float32), 32)
        blocks = codes.reshape(len(w), -1, 16) if packed == "_blocks" else codes
        return {packed: blocks, scale: torch.from_numpy(exponents.astype(np.uint8))}, values

    return _each(write)
