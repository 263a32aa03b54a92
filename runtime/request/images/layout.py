"""How an image is cut into the pieces that a tower sees, and what stands for them in a prompt."""

from dataclasses import dataclass

from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.towers import Grid, Tower


@dataclass(frozen=True)
class ImageLayout:
    """Pieces of one image: tiles row by row, then an overview of all of it. An image in one piece is its overview.

    overview: its grid of patches, None without one. rows, columns: of tiles, 0 for none. tile: grid of each.
    """

    overview: Grid | None
    rows: int = 0
    columns: int = 0
    tile: Grid = (0, 0)

    @property
    def grids(self) -> list[Grid]:
        """Of all pieces, in the order in which they are encoded."""
        tiles = [self.tile] * (self.rows * self.columns)
        return tiles if self.overview is None else [*tiles, self.overview]

    def tokens(self, vision: Tower) -> int:
        """Visual tokens of all pieces."""
        return sum(map(vision.tokens, self.grids))

    def ids(self, model: ModelMetadata) -> list[int]:
        """The token ids that take the place of an image's placeholder."""
        marks = model.image_marks
        ids = list(marks.begin)
        for _ in range(self.rows):
            for column in range(self.columns):
                ids += [*(marks.tile_break if column else ()), *_piece(self.tile, model)]
            ids += marks.tile_row_end
        if self.overview is not None:
            ids += [*marks.overview, *_piece(self.overview, model)]
        return [*ids, *marks.end]


def _piece(grid: Grid, model: ModelMetadata) -> list[int]:
    """The ids of one piece: of its visual tokens, and what stands between the rows of these."""
    assert model.image_token_id is not None  # of a model that has a tower
    tokens, between = model.tower.tokens(grid), model.image_marks.row_break
    rows = grid[0] // model.tower.merge_size if between else 1
    ids = [*[model.image_token_id] * (tokens // rows), *between] * rows
    return ids[: len(ids) - len(between)]
