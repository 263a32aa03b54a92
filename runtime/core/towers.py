"""What it takes to turn an image into the inputs of a model's vision graph: one class for each kind of tower."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import msgspec

Grid = tuple[int, int]  # rows and columns of patches
Ranges = dict[str, tuple[float, float]]

_PATCH_VALUES = 1 << 22  # numbers of one patch
_PIXELS = 1 << 26  # of a visual token and of a tile: to that size a smaller image is enlarged or filled up
_TAPS = {"bilinear": 4, "bicubic": 16}  # rows of the position table for a patch
_SHARED: Ranges = {
    "patch_size": (1, 1 << 10),
    "merge_size": (1, 1 << 6),
    "channels": (1, 1 << 4),
    "head_dim": (2, 1 << 16),
    "rope_theta": (1e-3, 1e30),
    "deepstack": (0, 1 << 10),
}


def _resampled(resampling: str) -> dict[str, tuple[int, str]]:
    """Inputs of a tower whose table of positions is resampled: rows of the table, and their shares."""
    taps = _TAPS[resampling]
    return {"position_index": (taps, "int64"), "position_weight": (taps, "float32")}


class Tower(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """What all towers have: patches in, merge_size x merge_size of them, which lie side by side, to a visual token.

    Patches come block by block, image after image. head_dim, rope_theta: of a rotary embedding on two axes.
    deepstack: feature levels beside the last one.
    """

    patch_size: int
    merge_size: int
    channels: int
    head_dim: int
    rope_theta: float
    deepstack: int = 0

    LIMITS: ClassVar[Ranges]  # of the fields that are numbers

    @property
    def patch_width(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.patch_size**2

    @property
    def queries(self) -> int:
        """Visual tokens of every image, whatever its grid; 0 where they are a share of its patches."""
        return 0

    @property
    def unit(self) -> int:
        """Patches that every image is a multiple of."""
        return self.merge_size**2 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def grid(self) -> Grid | None:
        """The only grid that an image, or a tile of one, has; None where any will do."""
        return None

    def tokens(self, grid: Grid) -> int:
        """Visual tokens of an image."""
        return self.rows(grid[0] * grid[1], 1)

    def rows(self, patches: int, images: int) -> int:
        """Visual tokens of some images that have so many patches together."""
        return images * self.queries or patches // self.merge_size**2

    def most_images(self, patches: int) -> int:
        """The most images of an engine's call of so many patches, which has room for `rows` of both."""
        return max(1, patches // max(self.unit, self.queries))

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        """The graph's inputs with a row for each patch: how wide it is, and its dtype.

        pixel_patches is one of them. Beside them the graph has image_start alone.
        """

    def refused(self) -> Iterator[tuple[str, Any, str]]:
        """(field, value, what is allowed) of what no tower has, beyond LIMITS."""
        if self.patch_width > _PATCH_VALUES:
            yield "patch_size", self.patch_size, f"patches of up to {_PATCH_VALUES} numbers"
        if (self.merge_size * self.patch_size) ** 2 > _PIXELS:
            yield "merge_size", self.merge_size, f"visual tokens of up to {_PIXELS} pixels"

    def _ropes(self) -> dict[str, tuple[int, str]]:
        pairs = 2 * ((self.head_dim // 2 + 1) // 2)
        return {"rope_cos": (pairs, "float32"), "rope_sin": (pairs, "float32")}


class GridTower(Tower, frozen=True, kw_only=True, tag="grid"):
    """A learned table of positions, resampled to each image's grid (Qwen3-VL, GLM-4V).

    temporal_patch_size: frames of a patch; a still image is repeated.
    position_grid: side of the table, [position_grid**2, hidden].
    position_resampling: bilinear (align_corners, border) or bicubic (half-pixel centres, border).
    """

    temporal_patch_size: int
    position_grid: int
    position_resampling: str

    LIMITS: ClassVar[Ranges] = _SHARED | {
        "temporal_patch_size": (1, 1 << 6),
        "position_grid": (1, 1 << 14),
    }

    @property
    def patch_width(self) -> int:
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        return {
            "pixel_patches": (self.patch_width, "float32"),
            **_resampled(self.position_resampling),
            **self._ropes(),
        }

    def refused(self) -> Iterator[tuple[str, Any, str]]:
        if self.position_resampling not in _TAPS:
            yield "position_resampling", self.position_resampling, ", ".join(sorted(_TAPS))
        yield from super().refused()


class PooledTower(Tower, frozen=True, kw_only=True, tag="pooled"):
    """A learned table of positions for each axis, and a mean over each block of patches at the end (Gemma 4).

    Its pixels are from -1 to 1. position_table: rows of each table; an image has at most as many patches a side.
    """

    position_table: int

    LIMITS: ClassVar[Ranges] = _SHARED | {"position_table": (1, 1 << 20)}

    @property
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        return {"pixel_patches": (self.patch_width, "float32"), "position_index": (2, "int64"), **self._ropes()}


class MoonTower(Tower, frozen=True, kw_only=True, tag="moon"):
    """A learned table of positions, resampled to each image's grid; a patch has one frame (MoonViT of Kimi-K2.5).

    position_grid: side of the table, [position_grid**2, hidden]. Resampling is bicubic, as in `GridTower`.
    """

    position_grid: int

    LIMITS: ClassVar[Ranges] = _SHARED | {"position_grid": (1, 1 << 14)}

    @property
    def position_resampling(self) -> str:
        return "bicubic"

    @property
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        return {
            "pixel_patches": (self.patch_width, "float32"),
            **_resampled(self.position_resampling),
            **self._ropes(),
        }


class RotaryTower(Tower, frozen=True, kw_only=True, tag="rotary"):
    """No table of positions: rotary embedding alone says where a patch is (Pixtral).

    Its axes share one series of head_dim / 2 frequencies: rows have the first, the third, ..., columns the others.
    """

    LIMITS: ClassVar[Ranges] = _SHARED

    @property
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        return {"pixel_patches": (self.patch_width, "float32"), **self._ropes()}


class ResampledTower(Tower, frozen=True, kw_only=True, tag="resampled"):
    """No table of positions, and a rotary embedding with the same frequencies on both axes (ERNIE 4.5 VL)."""

    LIMITS: ClassVar[Ranges] = _SHARED

    @property
    def temporal_patch_size(self) -> int:
        """Frames of a patch."""
        return 1

    @property
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        return {"pixel_patches": (self.patch_width, "float32"), **self._ropes()}


class TileTower(Tower, frozen=True, kw_only=True, tag="tiles"):
    """Images of one size with a class token each, a row of a table for each patch (InternVL, Llama 4).

    side: of an image, in patches. rope_theta: 0 without a rotary embedding; its places count from 1.
    """

    side: int

    LIMITS: ClassVar[Ranges] = _SHARED | {"rope_theta": (0, 1e30), "side": (1, 1 << 10)}

    @property
    def grid(self) -> Grid:
        return self.side, self.side

    @property
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        return {"pixel_patches": (self.patch_width, "float32"), **(self._ropes() if self.rope_theta else {})}

    def refused(self) -> Iterator[tuple[str, Any, str]]:
        if self.side % self.merge_size:
            yield "side", self.side, f"a multiple of merge_size = {self.merge_size}"
        if (self.side * self.patch_size) ** 2 > _PIXELS:
            yield "side", self.side, f"tiles of up to {_PIXELS} pixels"
        yield from super().refused()


class QueryTower(Tower, frozen=True, kw_only=True, tag="queries"):
    """Visual tokens that ask an image's patches by cross-attention, as many for every image (Aria).

    queries: how many. side: the longer one of an image, in patches. position_grid: side of the table of positions,
    [position_grid**2, hidden], of which a patch gets the row at its place in the image, as if the image were as large
    as the table.
    """

    queries: int
    side: int
    position_grid: int

    LIMITS: ClassVar[Ranges] = _SHARED | {
        "rope_theta": (0, 0),
        "queries": (1, 1 << 16),
        "side": (1, 1 << 10),
        "position_grid": (1, 1 << 14),
        "merge_size": (1, 1),
    }

    @property
    def inputs(self) -> Mapping[str, tuple[int, str]]:
        return {"pixel_patches": (self.patch_width, "float32"), "position_index": (1, "int64")}

    def refused(self) -> Iterator[tuple[str, Any, str]]:
        if (self.side * self.patch_size) ** 2 > _PIXELS:
            yield "side", self.side, f"images of up to {_PIXELS} pixels"
        yield from super().refused()


VisionMetadata = GridTower | PooledTower | MoonTower | RotaryTower | ResampledTower | TileTower | QueryTower
