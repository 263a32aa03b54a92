"""One byte for a weight, one scale for a tile of weights: fp8 in blocks, per channel, per tensor; MXFP8; int8.

Value: code * scale, though the scale of most is called `scale_inv` (DeepSeek-V3's `weight_scale_inv`, which Qwen and
GLM took over). A tile that the weight's edge cuts off is smaller. MXFP8's scales are exponents, one for 32 weights (OCP
Microscaling Formats 1.0).
"""

from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.quantized.layout import (
    FLOATS,
    Format,
    Parts,
    Spelling,
    exponents,
    matrix_shape,
    wrong_shape,
)
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import FLOAT, Coded, CodeForm, Codes, grouped
from moevlm.runtime.core.errors import CheckpointError

_KINDS = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8_e5m2", "int8": "int8"}
EXPONENTS = ("uint8", "float8_e8m0fnu")
_MX = 32
BLOCK = (128, 128)  # where the config does not say: what all publish


@dataclass(frozen=True)
class Tiles(Coded):
    """Codes [N, K] or [E, N, K] with a scale for each tile of rows x columns."""

    values: Stored
    scales: Stored
    tile: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def form(self) -> CodeForm:
        rows, columns = self.tile
        held = self.scales.dtype.name
        scales = "bfloat16" if held in EXPONENTS else held  # which has all powers of two that E8M0 has
        return CodeForm(_KINDS[self.values.dtype.name], columns, rows, scales=scales)

    def codes(self, start: int, stop: int) -> Codes:
        values = self.values.rows(start, stop).view(np.uint8)
        if self.form.kind == "int8":
            values ^= 128
        rows, columns = self.tile
        first, n = (0, self.shape[1]) if len(self.shape) == 3 else (start, stop - start)
        of_row = np.arange(first, first + n) // rows - first // rows
        return Codes(grouped(values, columns), self._grid(start, stop)[..., of_row, :])

    def _grid(self, start: int, stop: int) -> np.ndarray:
        """Scales of rows [start:stop] of the first axis: [stop - start, tiles, tiles]; of a matrix [tiles, tiles]."""
        rows, columns = (-(-size // tile) for size, tile in zip(self.shape[-2:], self.tile, strict=True))
        scales, outer, tile = self.scales, self.shape[:-2], self.tile[0]
        if outer and scales.shape[:1] == outer:
            return self._floats(scales.rows(start, stop)).reshape(-1, rows, columns)
        if scales.shape in ((), (1,)):
            whole = self._floats(scales.rows(0, 1)).reshape(1, 1)
            return np.broadcast_to(whole, (stop - start, 1, 1)) if outer else whole
        return self._floats(scales.rows(start // tile, -(-stop // tile))).reshape(-1, columns)

    def _floats(self, scales: np.ndarray) -> np.ndarray:
        return exponents(self.scales, scales) if self.scales.dtype.name in EXPONENTS else scales.astype(FLOAT)


def _read(parts: Parts) -> Coded:
    values, scales = parts["codes"], parts.of_dtype("scale", *FLOATS, *EXPONENTS)
    if "zero" in parts:
        raise CheckpointError(
            f"tensor {parts['zero'].name}: {values.dtype} weights with zero points are not supported "
            "(allowed: none, which is symmetric)"
        )
    outer, n, k = matrix_shape(values)
    tiles: list[tuple[int, int]] = [(1, _MX)] if scales.dtype.name in EXPONENTS else []
    tiles += [parts.settings.block or BLOCK, BLOCK, (n, k), (1, k), (1, BLOCK[1])]
    if outer:
        tiles.append((n, 1))  # experts [E, in, out], a scale for each output
    scalars = not (outer and parts.settings.block)  # one number cannot be for the blocks of many matrices
    by_shape: dict[tuple[int, ...], tuple[int, int]] = {}
    for tile in tiles:
        for shape in _shapes(outer, -(-n // tile[0]), -(-k // tile[1]), scalars):
            by_shape.setdefault(shape, tile)
    if parts.settings.block and by_shape.get((*outer, 1, 1)) == (n, k) != parts.settings.block:
        del by_shape[*outer, 1, 1]  # a grid of blocks that lost some
    if scales.shape not in by_shape:
        blocks = parts.settings.block or BLOCK
        grid, channels = [*outer, -(-n // blocks[0]), -(-k // blocks[1])], [*outer, n, 1]
        whole = [*outer, 1, 1] if not parts.settings.block else [] if scalars else None
        allowed = f"{grid} for blocks of {blocks[0]} x {blocks[1]}, {channels} for rows"
        allowed += "" if whole is None else f", {whole} for all"
        raise wrong_shape(scales, f"{allowed} of {list(values.shape)}")
    rows, columns = by_shape[scales.shape]
    return Tiles(values, scales, (rows, min(columns, k)))  # codes are filled up to whole tiles


def _shapes(outer: tuple[int, ...], rows: int, columns: int, scalars: bool) -> list[tuple[int, ...]]:
    """How a grid of scales may be stored: axes of 1 at the end may be left out.

    scalars: whether one number may stand for all, outer axes included.
    """
    shapes = [(*outer, rows, columns)]
    while len(shapes[-1]) > len(outer) and shapes[-1][-1:] == (1,):
        shapes.append(shapes[-1][:-1])
    if rows == columns == 1 and scalars:
        shapes += [(), (1,)]
    return shapes


TILES = Format(
    "fp8",
    tuple(_KINDS),
    (
        Spelling("", {"scale": "_scale_inv"}),
        Spelling("", {"scale": "_scale"}, {"zero": "_zero_point"}),
        Spelling("", {"scale": "_weight_scale"}),
        Spelling(".weight", {"scale": ".qscale_weight"}, plain=".weight"),
        Spelling(".weight", {"scale": ".scale"}, plain=".weight"),
    ),
    _read,
)
