"""Convolutions on disk whose steps do not overlap, or that take each channel for itself, as matrices."""

import numpy as np

from moevlm.export.families.sources import Indices, Shape, Source, Tensors, changed, expect, stored
from moevlm.export.graph.rearranged import reshape
from moevlm.export.graph.weights import PerRow, Weight
from moevlm.runtime.core.errors import CheckpointError


def flattened(pattern: str) -> Source:
    """A convolution over non-overlapping patches as a matrix: [out, in, (t,) h, w] -> [out, in * (t *) h * w]."""

    def source(tensors: Tensors, indices: Indices, shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        weight = _expect_rank(name, stored(tensors, name), 4, 5)
        return expect(name, reshape(weight, (weight.shape[0], int(np.prod(weight.shape[1:])))), shape)

    return source


def channels_last(pattern: str) -> Source:
    """A strided 2-D convolution on rows [kh, kw, in]: [out, in, kh, kw] -> [out, kh * kw * in]."""

    def source(tensors: Tensors, indices: Indices, shape: Shape, _: str) -> Weight:
        name = pattern.format(**indices)
        weight = _expect_rank(name, stored(tensors, name), 4)
        out, channels, height, width = weight.shape
        rows = PerRow(
            weight,
            (out, channels * height * width),
            weight.dtype,
            lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).reshape(len(a), -1),
        )
        return expect(name, rows, shape)

    return source


def unfolded(pattern: str) -> Source:
    """A projection of blocks of patches to the width of one, on rows of patches: [C, C * k] -> [C, k * C]."""

    def change(weight: Weight, shape: Shape) -> Weight:
        split = (shape[0], shape[1] // shape[0])
        return PerRow(
            weight,
            shape,
            weight.dtype,
            lambda a: np.ascontiguousarray(a.reshape(-1, *split).swapaxes(1, 2)).reshape(len(a), -1),
        )

    return changed(pattern, change)


def depthwise(pattern: str) -> Source:
    """A convolution over tokens that takes each channel for itself: [C, 1, kernel] -> [C, kernel]."""
    return changed(pattern, reshape, lambda shape: (shape[0], 1, *shape[1:]))


def _expect_rank(name: str, weight: Weight, *ranks: int) -> Weight:
    if len(weight.shape) not in ranks:
        asked = " or ".join(map(str, ranks))
        raise CheckpointError(f"tensor {name} has shape {list(weight.shape)}, the model asks for {asked} dimensions")
    return weight
