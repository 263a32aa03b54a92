"""Canonical PyTorch's vision tower, one block in memory at a time."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel, load
from moevlm.export.modules.streaming import parts_of, set_tensor, stream
from moevlm.runtime.engine.visual import HostFeatures
from moevlm.runtime.request.vision_inputs import VisionInputs


class Images:
    """The vision tower, block by block. An input that it has seen is not computed again."""

    def __init__(self, vision: nn.Module, model: CanonicalModel) -> None:
        self._vision, self._seen = vision, list[tuple[VisionInputs, HostFeatures]]()
        weights = model.vision_weights
        parts = parts_of(vision, (nn.ModuleList,))
        for name in vision.state_dict():
            if not name.startswith(tuple(f"{part}." for part in parts)):
                set_tensor(vision, name, torch.from_numpy(read(weights[name])))
        stream(parts, lambda name: load(parts[name], weights, f"{name}."))

    @torch.no_grad()
    def encode(self, inputs: VisionInputs) -> HostFeatures:
        for known, features in self._seen:
            if equal(known, inputs):
                return features
        embeds, deepstack = self._vision(**{name: torch.from_numpy(array) for name, array in inputs.arrays.items()})
        empty = np.zeros((0, *embeds.shape), np.float32)
        features = HostFeatures(embeds.numpy(), empty if deepstack is None else deepstack.numpy())
        self._seen.append((inputs, features))
        return features


def equal(first: object, second: object) -> bool:
    """Arrays, or dataclasses, mappings and tuples of them."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return equal(vars(first), vars(second)) if hasattr(first, "__dataclass_fields__") else first == second
