"""The module of a vision tower, found by the class of its config."""

from collections.abc import Callable
from typing import Any

from torch import nn

from moevlm.export.config import VisionConfig

# A tower keeps its config as `config`. Its forward takes the inputs that its metadata names, and image_start. It
# returns embeds [V, H], and deepstack [L, V, H] or None. Its modules of PER_PATCH see every patch, the others a visual
# token; parameters of TABLES are multiplied with nothing: positions, and what visual tokens ask patches for.
PER_PATCH = ("patch_embedding", "blocks", "keys", "values")
TABLES = ("position_embedding", "queries")
Maker = Callable[[Any], nn.Module]

_MAKERS: dict[type[VisionConfig], Maker] = {}


def register(config: type[VisionConfig]) -> Callable[[Maker], Maker]:
    """Class decorator: the module of towers that this config describes."""

    def add(maker: Maker) -> Maker:
        _MAKERS[config] = maker
        return maker

    return add


def vision_tower(config: VisionConfig) -> nn.Module:
    """The module of a tower."""
    return _MAKERS[type(config)](config)
