"""Weights in the order that the CPU kernels read.

Quantized: panels of 32 rows; in a panel, groups along K; in a group, 32 fp16 scales, then lines of 32 rows x 4 bytes
then, where rows have zeros of their own, 32 bytes of these (plugins/cpu/matmul/packing.h). Floats:
panels of 32 rows; in a panel, K lines of 32 values (float_linear.h beside it).
A panel depends on its own 32 rows only, so a weight may be packed, and written, some panels at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moevlm.export.formats.float4 import Float4Format
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.stored import EncodedFrom
from moevlm.export.graph.codes import Codes
from moevlm.export.graph.weights import Weight

Array = np.ndarray
PANEL = 32
BITS = (4, 8)
CpuForm = IntFormat | Float4Format


def panel_bytes(columns: int, bits: int, group_size: int, zeros: bool = False) -> int:
    """Size of 32 packed rows of `columns` values."""
    return -(-columns // group_size) * PANEL * (2 + group_size * bits // 8 + zeros)


def packed_bytes(rows: int, columns: int, bits: int, group_size: int, zeros: bool = False) -> int:
    """Size of a packed weight."""
    return -(-rows // PANEL) * panel_bytes(columns, bits, group_size, zeros)


def pack(q: Array, scales: Array, bits: int, group_size: int, zeros: Array | None = None) -> Array:
    """Values and scales -> packed bytes [panels, panel_bytes].

    q: [N, K] uint8; a weight is scale * (q - zero). scales: [N, ceil(K / group_size)], rounded to fp16 here. zeros: of
    that shape, uint8, or None for 2**(bits - 1).
    Rows are padded to a multiple of 32 with scale 0, columns to a multiple of the group size with the zero point.
    """
    _check(bits, group_size)
    rows, columns = q.shape
    panels, groups = -(-rows // PANEL), -(-columns // group_size)
    if scales.shape != (rows, groups):
        raise ValueError(f"scales has shape {list(scales.shape)} (allowed: [{rows}, {groups}])")
    if (panels * PANEL, groups * group_size) != q.shape:
        padded = np.full((panels * PANEL, groups * group_size), 1 << (bits - 1), np.uint8)
        padded[:rows, :columns] = q
        q = padded
        scales = np.concatenate([scales, np.zeros((panels * PANEL - rows, groups), scales.dtype)])
    behind = 2 * PANEL + PANEL * group_size * bits // 8  # the lines
    out = np.empty((panels, groups, behind + (PANEL if zeros is not None else 0)), np.uint8)
    if np.abs(scales).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"a scale is {np.abs(scales).max():.3g} (allowed: up to {np.finfo(np.float16).max}, for fp16)")
    out[..., : 2 * PANEL].view(np.float16)[:] = scales.reshape(panels, PANEL, groups).transpose(0, 2, 1)
    if bits == 4:
        # Eight values of k are a 64-bit word: its low half gives the low nibbles, its high half the high ones.
        word = np.ascontiguousarray(q).view(np.uint64).reshape(panels, PANEL, groups, group_size // 8)
        values = (word | (word >> np.uint64(28))).astype(np.uint32)
    else:
        values = np.ascontiguousarray(q).view(np.uint32).reshape(panels, PANEL, groups, group_size // 4)
    lines = out[..., 2 * PANEL : behind].view(np.uint32).reshape(panels, groups, values.shape[3], PANEL)
    lines[:] = values.transpose(0, 2, 3, 1)
    if zeros is not None:
        filled = np.concatenate([zeros, np.zeros((panels * PANEL - rows, groups), np.uint8)])
        out[..., behind:] = filled.reshape(panels, PANEL, groups).transpose(0, 2, 1)
    return out.reshape(panels, -1)


def unpack_zeros(packed: Array, rows: int, columns: int, bits: int, group_size: int) -> Array:
    """Of a weight that was packed with zeros: [rows, groups] uint8."""
    _check(bits, group_size)
    panels, groups = -(-rows // PANEL), -(-columns // group_size)
    behind = packed.reshape(panels, groups, -1)[..., -PANEL:]
    return behind.transpose(0, 2, 1).reshape(panels * PANEL, groups)[:rows]


def unpack(packed: Array, rows: int, columns: int, bits: int, group_size: int) -> tuple[Array, Array]:
    """The inverse of `pack`: q [rows, columns] uint8 and scales [rows, ceil(columns / group_size)] float16."""
    _check(bits, group_size)
    panels, groups = -(-rows // PANEL), -(-columns // group_size)
    parts, behind = packed.reshape(panels, groups, -1), 2 * PANEL + PANEL * group_size * bits // 8
    scales = np.ascontiguousarray(parts[..., : 2 * PANEL]).view(np.float16).transpose(0, 2, 1)
    lines = np.ascontiguousarray(parts[..., 2 * PANEL : behind]).reshape(panels, groups, -1, PANEL, 4)
    if bits == 4:
        lines = np.concatenate([lines & 15, lines >> 4], axis=4)
    q = lines.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, groups * group_size)
    return q[:rows, :columns], scales.reshape(panels * PANEL, groups)[:rows]


def interleave(gate_up: Array) -> Array:
    """Rows [2I, ...], gate first, then up -> the order of a gated expert's panels: 16 gate rows, 16 up rows, and so on.

    I is padded to a multiple of 16 with zeros: rows whose scales are 0, so their values do not matter.
    """
    width = len(gate_up) // 2
    half = PANEL // 2
    halves = gate_up.reshape(2, width, *gate_up.shape[1:])
    padding = [(0, 0), (0, -width % half), *[(0, 0)] * (gate_up.ndim - 1)]
    halves = np.pad(halves, padding) if width % half else halves
    panels = halves.reshape(2, -1, half, *gate_up.shape[1:])
    return panels.swapaxes(0, 1).reshape(-1, *gate_up.shape[1:])


def pack_gate_up(q: Array, scales: Array, bits: int, group_size: int, zeros: Array | None = None) -> Array:
    """`pack` for the gate_up weight of a gated expert: q [2I, K], gate rows first, then up rows."""
    zeros = None if zeros is None else interleave(zeros)
    return pack(interleave(q), interleave(scales), bits, group_size, zeros)


def pack_floats(weight: Array) -> Array:
    """[N, K] float32 -> [panels, K * 32] float32; the rows that fill the last panel are zeros."""
    rows, columns = weight.shape
    padded = np.pad(weight, [(0, -rows % PANEL), (0, 0)]) if rows % PANEL else weight
    return padded.reshape(-1, PANEL, columns).swapaxes(1, 2).reshape(-1, columns * PANEL)


def _check(bits: int, group_size: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits = {bits} (allowed: 4, 8)")
    if group_size % 16 or not 16 <= group_size <= 256:
        raise ValueError(f"group_size = {group_size} (allowed: a multiple of 16 up to 256)")


@dataclass(frozen=True)
class PackedRows:
    """A weight [N, K] as [panels, panel bytes], quantized and packed as it is read."""

    source: Weight
    scheme: CpuForm

    @cached_property
    def encoding(self) -> EncodedFrom:
        return EncodedFrom(self.source, _stored_form(self.scheme))

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return -(-rows // PANEL), panel_bytes(columns, *_layout(self.scheme))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def rows(self, start: int, stop: int) -> Array:
        found = self.encoding.rows(start * PANEL, min(stop * PANEL, self.source.shape[0]))
        return _packed(pack, found, self.scheme)


@dataclass(frozen=True)
class PackedFloats:
    """A weight [N, K] as [panels, K * 32] float32, packed as it is read."""

    source: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return -(-rows // PANEL), columns * PANEL

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> Array:
        rows = self.source.rows(start * PANEL, min(stop * PANEL, self.source.shape[0]))
        return pack_floats(rows.astype(np.float32, copy=False))


@dataclass(frozen=True)
class PackedExperts:
    """A weight [E, N, K] as [E, bytes], one expert after the other. interleaved: N is gate rows, then up rows."""

    source: Weight
    scheme: CpuForm
    interleaved: bool

    @cached_property
    def encoding(self) -> EncodedFrom:
        return EncodedFrom(self.source, _stored_form(self.scheme))

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, columns = self.source.shape
        if self.interleaved:
            rows = -(-rows // PANEL) * PANEL
        return experts, packed_bytes(rows, columns, *_layout(self.scheme))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def rows(self, start: int, stop: int) -> Array:
        make = pack_gate_up if self.interleaved else pack
        out = np.empty((stop - start, self.shape[1]), np.uint8)
        for i in range(stop - start):
            found = self.encoding.rows(start + i, start + i + 1)
            out[i] = _packed(make, found, self.scheme).reshape(-1)
        return out


def _stored_form(scheme: CpuForm) -> CpuForm:
    return replace(scheme, scales="float16")


def _layout(scheme: CpuForm) -> tuple[int, int, bool]:
    return scheme.bits, scheme.group_size, scheme.zeros


def _packed(make: Callable[..., Array], found: Codes, scheme: CpuForm) -> Array:
    codes = found.codes.reshape(len(found.codes), -1)
    return make(codes, found.scales, scheme.bits, scheme.group_size, found.zeros)
