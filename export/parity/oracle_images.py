"""How transformers takes and gives images, by the kind of their tower."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moevlm.export.parity.cases import Case
from moevlm.runtime.core.towers import (
    Grid,
    GridTower,
    MoonTower,
    PooledTower,
    QueryTower,
    ResampledTower,
    RotaryTower,
    TileTower,
    Tower,
)
from moevlm.runtime.request.images.blocks import block_order

# embeds [V, H], and a level [V, H] each of deepstack.
Features = tuple[Tensor, Sequence[Tensor]]
IMAGE_TYPES = "moe_mm_token_type_ids"  # what transformers calls which tokens go to experts for images


class OracleImages(ABC):
    """One kind of tower in transformers. model: the whole one there."""

    @abstractmethod
    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        """Let `found` be called with the features of every call of the tower."""

    @abstractmethod
    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:
        """The model's arguments for the images of all cases, of which there is one at least."""

    def types(self, ids: Tensor, config: Any) -> dict[str, Tensor]:  # noqa: ARG002
        """The model's arguments for token ids [B, S], images or not."""
        return {}

    def processing(self, vision: Tower) -> dict[str, Any]:  # noqa: ARG002
        """What transformers' processor of texts and images says to that of images."""
        return {}

    def written(self, tokenizer: Any, token: str, rows: int, columns: int) -> str:
        """What transformers' processor of texts and images writes for an image of so many visual tokens."""
        begin, end = (getattr(tokenizer, name, None) or "" for name in ("boi_token", "eoi_token"))
        return f"{begin}{token * (rows * columns)}{end}"

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


class _TypedImages(_GridImages):
    """The same, for a model that has to be told which tokens belong to images (ERNIE 4.5 VL)."""

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        model.model.resampler_model.register_forward_hook(lambda _m, _i, output: found((output, ())))

    def types(self, ids: Tensor, config: Any) -> dict[str, Tensor]:
        marks = [config.image_token_id, config.image_start_token_id, config.image_end_token_id]
        return {IMAGE_TYPES: torch.isin(ids, torch.tensor(marks)).int()}


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

    def processing(self, vision: Tower) -> dict[str, Any]:
        options = {"return_tensors": "pt"}  # numpy has no bfloat16, which Llama 4's are
        return options if vision.rope_theta else options | {"crop_to_patches": True}  # InternVL's

    def written(self, tokenizer: Any, token: str, rows: int, columns: int) -> str:
        if begin := getattr(tokenizer, "start_image_token", None):  # InternVL's
            return f"{begin}{token * (rows * columns)}{tokenizer.end_image_token}"
        return f"<|image_start|>{token}{'<|patch|>' * (rows * columns)}<|image_end|>"

    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:
        pixels, size = processed["pixel_values"].float().numpy(), vision.patch_size
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


class _SizedImages(OracleImages):
    """Towers that take pixels of images, in one batch as large as the largest, and the sizes of these (Pixtral)."""

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            rows = output.flatten(0, -2)
            found((rows, ()))
            return rows[None]  # a first axis of 1 is taken away, which may not be that of an image's only token

        model.model.multi_modal_projector.register_forward_hook(hook)

    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:
        grids = [grid for case in cases for grid in case.grids]
        patches, side = np.concatenate([case.patches for case in cases]), vision.patch_size
        height, width = np.max(grids, axis=0)
        pixels = np.zeros((len(grids), height, width, 3, side, side), np.float32)
        image = np.repeat(np.arange(len(grids)), [h * w for h, w in grids])
        pixels[image, *block_order(grids, vision.merge_size)] = patches.reshape(-1, 3, side, side)
        batch = pixels.transpose(0, 3, 1, 4, 2, 5).reshape(len(grids), 3, height * side, width * side)
        return {"pixel_values": torch.from_numpy(batch), "image_sizes": torch.tensor(grids) * side}

    def processing(self, vision: Tower) -> dict[str, Any]:
        return {"patch_size": vision.patch_size * vision.merge_size}

    def written(self, tokenizer: Any, token: str, rows: int, columns: int) -> str:  # noqa: ARG002
        return "[IMG_BREAK]".join([token * columns] * rows) + "[IMG_END]"

    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:
        side = vision.patch_size
        height, width = (int(size) // side for size in processed["image_sizes"][0])
        pixels = processed["pixel_values"][0].reshape(3, height, side, width, side).transpose(1, 3, 0, 2, 4)
        return [(height, width)], pixels[block_order([(height, width)], vision.merge_size)].reshape(height * width, -1)


class _RowImages(OracleImages):
    """Towers that take the patches of an image row by row, and its grid (Kimi-K2.5)."""

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        model.model.mm_projector.register_forward_hook(lambda _m, _i, output: found((output.squeeze(1), ())))

    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:
        grids = [grid for case in cases for grid in case.grids]
        rows, columns = block_order(grids, vision.merge_size)
        image = np.repeat(np.arange(len(grids)), [h * w for h, w in grids])
        patches = np.concatenate([case.patches for case in cases])[np.lexsort((columns, rows, image))]
        return {
            "pixel_values": torch.from_numpy(patches.reshape(-1, 3, vision.patch_size, vision.patch_size)),
            "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
        }

    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:
        _, height, width = map(int, processed["image_grid_thw"][0])
        rows, columns = block_order([(height, width)], vision.merge_size)
        return [(height, width)], processed["pixel_values"][rows * width + columns].reshape(height * width, -1)


class _MaskedImages(OracleImages):
    """Towers that take images as squares of one size, and a mask of the pixels that belong to each (Aria)."""

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        model.model.multi_modal_projector.register_forward_hook(
            lambda _m, _i, output: found((output.flatten(0, 1), ()))
        )

    def inputs(self, cases: Sequence[Case], vision: Tower) -> dict[str, Tensor]:
        grids = [grid for case in cases for grid in case.grids]
        patches, size = np.concatenate([case.patches for case in cases]), vision.patch_size
        side, image = _longer_side(vision), np.repeat(np.arange(len(grids)), [h * w for h, w in grids])
        pixels, there = (
            np.zeros((len(grids), side, side, 3, size, size), np.float32),
            np.zeros((len(grids), side, side)),
        )
        at = (image, *block_order(grids, vision.merge_size))
        pixels[at], there[at] = patches.reshape(-1, 3, size, size), 1
        batch = pixels.transpose(0, 3, 1, 4, 2, 5).reshape(len(grids), 3, side * size, side * size)
        mask = there.repeat(size, axis=1).repeat(size, axis=2) > 0
        return {"pixel_values": torch.from_numpy(batch), "pixel_mask": torch.from_numpy(mask)}

    def processing(self, vision: Tower) -> dict[str, Any]:
        return {"max_image_size": _longer_side(vision) * vision.patch_size, "split_image": False}

    def patches(self, processed: Any, vision: Tower) -> tuple[list[Grid], np.ndarray]:
        (mask,), (pixels,) = processed["pixel_mask"], processed["pixel_values"]
        side, size = _longer_side(vision), vision.patch_size
        height, width = (-(-int(line.sum()) // size) for line in (mask[:, 0], mask[0]))
        patches = pixels.reshape(3, side, size, side, size).transpose(1, 3, 0, 2, 4)
        return [(height, width)], patches[:height, :width].reshape(height * width, -1)


def _longer_side(vision: Tower) -> int:
    assert isinstance(vision, QueryTower)
    return vision.side


_KINDS: dict[type[Tower], OracleImages] = {
    GridTower: _GridImages(),
    MoonTower: _RowImages(),
    PooledTower: _PlacedImages(),
    QueryTower: _MaskedImages(),
    ResampledTower: _TypedImages(),
    RotaryTower: _SizedImages(),
    TileTower: _TileImages(),
}


def oracle_images(vision: Tower) -> OracleImages:
    """What there is to know of this tower."""
    return _KINDS[type(vision)]
