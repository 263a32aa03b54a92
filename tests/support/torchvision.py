"""The few functions of torchvision that transformers' image processors call, for tests where it is not installed.

As torchvision 0.24 `transforms/v2/functional` has them: resizing is torch's own interpolation, on bytes as they are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import image_processing_backends

MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def resize(image: torch.Tensor, size: Sequence[int], interpolation: str, antialias: bool) -> torch.Tensor:
    """A batch of images of bytes, [N, 3, H, W]."""
    assert image.dtype == torch.uint8
    assert image.dim() == 4
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, list(size), mode=interpolation, align_corners=False, antialias=antialias)


def pad(
    image: torch.Tensor, padding: Sequence[int], fill: int | Sequence[int], padding_mode: str = "constant"
) -> torch.Tensor:
    """padding: left, top, right, bottom. fill: black."""
    assert padding_mode == "constant"
    assert not np.any(fill)
    left, top, right, bottom = padding
    return F.pad(image, (left, right, top, bottom))


def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool) -> torch.Tensor:
    """In the dtype of the image."""
    assert image.is_floating_point()
    gains = [torch.as_tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std)]
    return (image if inplace else image.clone()).sub_(gains[0]).div_(gains[1])


FUNCTIONS = SimpleNamespace(
    resize=resize, pad=pad, normalize=normalize, InterpolationMode=SimpleNamespace(BILINEAR="bilinear", LANCZOS=None)
)


@contextmanager
def in_place_of_torchvision(name: str) -> Iterator[ModuleType]:
    """transformers' module of this name, imported with these functions; nothing of it is left behind."""
    package = ModuleType("torchvision.transforms.v2")
    package.functional = FUNCTIONS  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_processing_backends, "tvF", FUNCTIONS, raising=False)
        patch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", MODES)
        with pytest.MonkeyPatch.context() as importing:
            for part in ("torchvision", "torchvision.transforms", package.__name__):
                importing.setitem(sys.modules, part, package)
            module = importlib.import_module(name)
        del sys.modules[name]
        yield module
