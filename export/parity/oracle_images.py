"""How transformers takes and gives images, by the kind of their tower."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moevlm.export.parity.cases import Case
from moevlm.runtime.core.towers import Grid, GridTower, PooledTower, TileTower, Tower
from moevlm.runtime.request.images.blocks import block_order

# embeds [V, H], and a level [V, H] each of deepstack.
Features = tuple[Tensor, Sequence[Tensor]]


class OracleImages(ABC):
    """One kind of tower in transformers. model: the whole one there."""

    @abstractmethod
    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        """Let `found` be called with the features of every call of the tower."""

    @abstractmethod
    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:
        """The model's arguments for the images of all cases, of which there is one at least."""

    @abstractmethod
    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:
        """Grids of pieces, and patches [P, patch_width], of the one image that transformers' processor was given."""


class _GridImages(OracleImages):
    """Towers that take images by their grids, patches block by block (Qwen, GLM)."""

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found((output.pooler_output, getattr(output, "deepstack_features", None) or ()))

        model.model.visual.register_forward_hook(hook)

    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:  # noqa: ARG002
        grids = [[1, h, w] for case in cases for h, w in case.grids]
        return {
            "pixel_values": torch.from_numpy(np.concatenate([case.patches for case in cases])),
            "image_grid_thw": torch.tensor(grids),
        }

    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:  # noqa: ARG002
        _, height, width = processed["image_grid_thw"][0]
        return [(int(height), int(width))], processed["pixel_values"]


class _PlacedImages(OracleImages):
    """Towers that take an image in a row as long as the longest, and where each of its patches is (Gemma 4).

    What transformers gives such a tower are pixels from 0 to 1.
    """

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        model.model.embed_vision.register_forward_hook(lambda _m, _i, output: found((output, ())))

    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:
        grids = [grid for case in cases for grid in case.grids]
        sizes = [h * w for h, w in grids]
        rows, columns = block_order(grids, vision.merge_size)
        values = (np.concatenate([case.patches for case in cases]) + 1) / 2
        patches = np.zeros((len(sizes), max(sizes), values.shape[1]), np.float32)
        places = np.full((len(sizes), max(sizes), 2), -1, np.int64)
        for image, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
            own = slice(end - size, end)
            patches[image, :size] = values[own]
            places[image, :size] = np.stack([columns[own], rows[own]], axis=1)
        return {"pixel_values": torch.from_numpy(patches), "image_position_ids": torch.from_numpy(places)}

    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:
        width, height = (int(side) + 1 for side in processed["image_position_ids"][0].max(axis=0))
        rows, columns = block_order([(height, width)], vision.merge_size)
        return [(height, width)], 2 * processed["pixel_values"][0][rows * width + columns] - 1


class _TileImages(OracleImages):
    """Towers that take the pixels of images of one size (InternVL, Llama 4)."""

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        inner = model if hasattr(model, "multi_modal_projector") else model.model
        inner.multi_modal_projector.register_forward_hook(lambda _m, _i, output: found((output.flatten(0, -2), ())))

    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:
        patches = np.concatenate([case.patches for case in cases])
        blocks = patches.reshape(-1, *_sides(vision), 3, vision.patch_size, vision.patch_size)
        pixels = blocks.transpose(0, 5, 1, 3, 6, 2, 4, 7)
        side = vision.patch_size * _grid(vision)[0]
        return {"pixel_values": torch.from_numpy(pixels.reshape(len(pixels), 3, side, side))}

    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:
        pixels, size = np.asarray(processed["pixel_values"]), vision.patch_size
        rows, columns, *inside = _sides(vision)
        blocks = pixels.reshape(len(pixels), 3, rows, inside[0], size, columns, inside[1], size)
        patches = blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, vision.patch_width)
        return [_grid(vision)] * len(pixels), patches


def _grid(vision: Tower) -> Grid:
    assert vision.grid is not None
    return vision.grid


def _sides(vision: Tower) -> tuple[int, int, int, int]:
    """Rows and columns of visual tokens, rows and columns of patches in one."""
    merge, (rows, columns) = vision.merge_size, _grid(vision)
    return rows // merge, columns // merge, merge, merge


_KINDS: dict[type[Tower], OracleImages] = {
    GridTower: _GridImages(),
    PooledTower: _PlacedImages(),
    TileTower: _TileImages(),
}


def oracle_images(vision: Tower) -> OracleImages:
    """What there is to know of this tower."""
    return _KINDS[type(vision)]
