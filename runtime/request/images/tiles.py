"""What image processors for a TileTower have in common: how many tiles an image may have, the values of a patch."""

from abc import abstractmethod
from typing import ClassVar

from moevlm.runtime.core.errors import RefusedOption
from moevlm.runtime.core.towers import TileTower
from moevlm.runtime.request.image_limits import LOW_DETAIL_PIXELS, ImageLimits, require_absent, require_pixels
from moevlm.runtime.request.images.fields import refuse
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.images.processor import ImageProcessor

_MOST_TILES, _MOST_PIXELS = 256, 1 << 26  # that a preprocessor may allow: an elongated image fills all tiles


class TileImages(ImageProcessor):
    """An image in tiles of one size and an overview, or in one piece.

    SIDE, TILES: side of a tile in pixels, and the most tiles, where the fields do not say.
    """

    TOWER = TileTower
    SIZES: ClassVar = {}
    SIDE: ClassVar[int]
    TILES: ClassVar[int]

    _vision: TileTower

    def _read(self) -> None:
        super()._read()
        self._grid, self._side = (self._vision.side, self._vision.side), self._vision.side * self._vision.patch_size
        size = self._fields.get("size", {"height": self.SIDE, "width": self.SIDE})
        if size != {"height": self._side, "width": self._side}:
            refuse("size", size, f"height = width = {self._side}, as in manifest.json")
        self._tiles = self._count("max_patches", self.TILES)
        if self._tiles * self._side**2 > _MOST_PIXELS:
            refuse("max_patches", self._tiles, f"tiles of up to {_MOST_PIXELS} pixels together")

    def _count(self, field: str, default: int) -> int:
        """A number of tiles. Raises BundleError."""
        value = self._fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_TILES:
            refuse(field, value, f"a whole number from 1 to {_MOST_TILES}")
        return int(value)

    @property
    def max_patches(self) -> int:
        return self._vision.unit

    def _layout(self, height: int, width: int, limits: ImageLimits) -> ImageLayout:
        rows, columns = self._cut(height, width, self._most_tiles(limits))
        return ImageLayout(self._grid) if rows * columns == 1 else ImageLayout(self._grid, rows, columns, self._grid)

    @abstractmethod
    def _cut(self, height: int, width: int, most: int) -> tuple[int, int]:
        """Rows and columns of at most so many tiles."""

    def _resized(self, height: int, width: int, limits: ImageLimits) -> tuple[int, int]:  # noqa: ARG002 - one size
        return self._side, self._side

    def _most_tiles(self, limits: ImageLimits) -> int:
        """The most tiles that an image may have beside its overview; 1: it stays in one piece. Raises RefusedOption."""
        tiles, area = self._tiles, self._side**2
        why = f"images of this model are cut into tiles of {self._side} x {self._side} pixels"
        require_absent("min_pixels", limits.min_pixels, why)
        if limits.max_pixels is not None:
            largest = area * max(tiles, min(_MOST_TILES, self._max_pixels // area))
            require_pixels("max_pixels", limits.max_pixels, area, "tile", largest)
            tiles = limits.max_pixels // area
        if (tokens := self.most_tokens(limits)) is not None:
            each = self._vision.tokens(self._grid)
            if tokens < each:
                raise RefusedOption("max_image_tokens", tokens, f"{each}, which is one tile, or more")
            tiles = min(tiles, max(1, tokens // each - 1))
        return min(tiles, max(1, LOW_DETAIL_PIXELS // area)) if limits.low_detail else tiles
