"""A prompt as the decoder takes it: token ids with every image expanded, and where each token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moevlm.runtime.core.errors import RefusedOption, RequestError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.printable import counted
from moevlm.runtime.core.towers import Grid
from moevlm.runtime.request.positions import rope_positions

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.request.images.slices import Slice

MAX_SIDE = 1 << 20  # patches; products of two such fit into int64

SMALLER_IMAGES = "max_image_tokens makes images smaller"


def smaller_images(model: ModelMetadata) -> str:
    """What follows an error about too many tokens of images: a remedy, where there is one."""
    return "" if model.tower.queries else f" ({SMALLER_IMAGES})"


@dataclass(frozen=True)
class Prompt:
    """One sequence before generation.

    ids: [S] int64. visual_index: [S] int64, running row of this prompt's visual features, -1 for text.
    positions: [3, S] int64, on the time, height and width axes. next_position: of the first generated token.
    images: resized to whole patches, in the order of their tokens: pieces of images, and slices of videos.
    sources: of which image or video each of them is a part, for messages: image 1.
    """

    ids: np.ndarray
    visual_index: np.ndarray
    positions: np.ndarray
    next_position: int
    images: tuple[Image | Slice, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def image_tokens(self) -> int:
        return int(np.count_nonzero(self.visual_index >= 0))

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[int] | np.ndarray,
        grids: Sequence[Grid],
        model: ModelMetadata,
        images: Sequence[Image | Slice] = (),
        sources: Sequence[str] = (),
    ) -> Prompt:
        """ids: [S], images already expanded. grids: (h, w) in patches of each of `images`. Raises RequestError.

        sources: by default each of `images` is an image of its own.
        """
        tokens = _token_ids(ids, model)
        require_room(len(tokens), model)
        _check_grids(grids, model)
        is_image = np.isin(tokens, model.visual_token_ids)
        visual_index = np.where(is_image, np.cumsum(is_image) - 1, -1)
        positions, next_position = rope_positions(tokens, list(grids), model)
        named = sources or [f"image {number}" for number in range(1, len(images) + 1)]
        return cls(tokens, visual_index, positions, next_position, tuple(images), tuple(named))


def require_tower(model: ModelMetadata, images: int) -> None:
    """Raise RequestError for images of a prompt that goes to a model of text alone. images: how many."""
    if images and model.vision is None:
        raise RequestError(f"the prompt has {counted(images, 'image')}, and {model.model_type} takes text alone")


def _token_ids(ids: Sequence[int] | np.ndarray, model: ModelMetadata) -> np.ndarray:
    """[S] int64, each inside the vocabulary."""
    try:
        tokens = np.asarray(ids)
    except (TypeError, ValueError, OverflowError):  # lists of different lengths
        tokens = np.empty((), object)
    if tokens.size == 0 and tokens.ndim == 1:
        raise RequestError("the prompt is empty")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RefusedOption("ids", ids, "a list of whole numbers")
    unknown = tokens[(tokens < 0) | (tokens >= model.vocabulary)]
    if unknown.size:
        raise RequestError(f"token id {unknown[0]} is outside the model's vocabulary of {model.vocabulary}")
    return tokens.astype(np.int64)


def _check_grids(grids: Sequence[Grid], model: ModelMetadata) -> None:
    if model.vision is None:
        if len(grids):
            raise RequestError(f"{len(grids)} grids of images for {model.model_type}, which takes text alone")
        return
    merge = model.vision.merge_size
    for grid in grids if isinstance(grids, (list, tuple)) else [grids]:
        pair = grid if isinstance(grid, (list, tuple)) else ()
        good = len(pair) == 2 and all(isinstance(n, (int, np.integer)) and 0 < n <= MAX_SIDE for n in pair)
        if not good or any(n % merge for n in pair) or model.vision.grid not in (None, (*pair,)):
            raise RefusedOption("grids", grids, str(model.vision.grid or f"(h, w), multiples of {merge}"))


def require_room(tokens: int, model: ModelMetadata, images: bool = False) -> None:
    """Raise RequestError for more tokens than the context has. images: these are what could be less."""
    if tokens > model.context:
        remedy = smaller_images(model) if images else ""
        raise RequestError(f"the prompt has {tokens} tokens, the model's context {model.context}{remedy}")
