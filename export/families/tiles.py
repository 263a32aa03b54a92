"""What towers of images of one size have in common: fields of config.json, and the order of their positions."""

import math

import numpy as np

from moevlm.export.families.fields import Fields
from moevlm.export.families.sources import Indices, Shape, Source, Tensors
from moevlm.export.graph.rearranged import Reordered, RowBlocks
from moevlm.export.graph.weights import Concat, Sum, Weight
from moevlm.runtime.core.errors import CheckpointError

_LONGEST = 1 << 14  # side of an image, in pixels


def tile_sides(vision: Fields, merge: int) -> tuple[int, int]:
    """Sides of an image, in patches, and of a patch, in pixels.

    merge: patches along a side of a visual token. Raises CheckpointError for images that are no square of whole tokens.
    """
    vision.get("tie_word_embeddings", None)  # transformers 4 wrote it everywhere; a vision tower has no head
    image, patch = _side(vision, "image_size", 448), _side(vision, "patch_size", 14)
    if image % (patch * merge):
        raise vision.invalid("image_size", image, f"a multiple of {patch * merge}, the side of a visual token")
    return image // patch, patch


def merged_side(fields: Fields, key: str) -> int:
    """Patches along a side of a visual token, by the field that has its inverse."""
    return int(fields.choice(key, {1.0: 1, 0.5: 2, 0.25: 4}, 0.5))


def _side(vision: Fields, key: str, default: int) -> int:
    if not isinstance(vision.get(key, default), list | tuple):
        return vision.positive(key, default)
    sides = vision.counts(key)
    if len(sides) != 2 or sides[0] != sides[1] or not 1 <= sides[0] <= _LONGEST:
        raise vision.invalid(key, list(sides), f"a number from 1 to {_LONGEST}, or twice the same")
    return sides[0]


def positions(table: Source, token: Source, joined: str, class_first: bool) -> Source:
    """Rows of a table of positions, block by block, then the class token with its own.

    table: gives [P + 1, hidden], the patches row by row. token: gives [1, hidden]. class_first: whether the class
    token's row is the table's first, or its last. joined: a tensor whose last axis is as wide as the patches of a
    visual token side by side.
    """

    def source(tensors: Tensors, indices: Indices, shape: Shape, layout: str) -> Weight:
        rows, hidden = shape
        side, merge = math.isqrt(rows - 1), math.isqrt(tensors[joined].shape[-1] // hidden)
        if merge * merge * hidden != tensors[joined].shape[-1] or side % merge:
            width = tensors[joined].shape[-1]
            raise CheckpointError(f"tensor {joined} is {width} wide, the model asks for {hidden} times a square")
        places = table(tensors, indices, shape, layout)
        own = RowBlocks(places, 1, rows, 0 if class_first else rows - 1)
        patches = RowBlocks(places, rows - 1, rows, int(class_first))
        order = np.arange(rows - 1).reshape(side // merge, merge, side // merge, merge).swapaxes(1, 2)
        last = Sum(token(tensors, indices, (1, hidden), layout), own)
        return Concat([Reordered(patches, order.reshape(-1).tolist()), last])

    return source
