"""How transformers takes and gives images, by the kind of their tower."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moevlm.export.parity.cases import Case
from moevlm.runtime.core.towers import GridTower, Tower

# embeds [V, H], and a level [V, H] each of deepstack.
Features = tuple[Tensor, Sequence[Tensor]]


class OracleImages(ABC):
    """One kind of tower in transformers. model: the whole one there."""

    @abstractmethod
    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        """Let `found` be called with the features of every call of the tower."""

    @abstractmethod
    def inputs(self, cases: Sequence[Case]) -> dict[str, Tensor]:
        """The model's arguments for the images of all cases, of which there is one at least."""

    @abstractmethod
    def patches(self, processed: Any) -> tuple[tuple[int, int], np.ndarray]:
        """Grid and patches [P, patch_width] of the one image that transformers' image processor was given."""


class _GridImages(OracleImages):
    """Towers that take images by their grids, patches block by block (Qwen, GLM)."""

    def watch(self, model: Any, found: Callable[[Features], None]) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found((output.pooler_output, getattr(output, "deepstack_features", None) or ()))

        model.model.visual.register_forward_hook(hook)

    def inputs(self, cases: Sequence[Case]) -> dict[str, Tensor]:
        grids = [[1, h, w] for case in cases for h, w in case.grids]
        return {
            "pixel_values": torch.from_numpy(np.concatenate([case.patches for case in cases])),
            "image_grid_thw": torch.tensor(grids),
        }

    def patches(self, processed: Any) -> tuple[tuple[int, int], np.ndarray]:
        _, height, width = processed["image_grid_thw"][0]
        return (int(height), int(width)), processed["pixel_values"]


_KINDS: dict[type[Tower], OracleImages] = {GridTower: _GridImages()}


def oracle_images(vision: Tower) -> OracleImages:
    """What there is to know of this tower."""
    return _KINDS[type(vision)]
