"""Updates of an adapter added to weights as they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moevlm.export.checkpoint.lora.adapter import Update
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.errors import CheckpointError, one_line


@dataclass(frozen=True)
class Merged:
    """A weight and what is added to it, float32. change: of rows [start:stop] of the first axis."""

    source: Weight
    change: Callable[[int, int], np.ndarray]
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.source.rows(start, stop).astype(np.float32, copy=False) + self.change(start, stop)


def merge(weight: Weight, updates: Sequence[Update]) -> Weight:
    """A module's weight [out, in] with its updates. Raises CheckpointError for one of another shape."""
    for update in updates:
        if update.experts != 1 or update.shape != weight.shape:
            raise _misfit(update, weight)
        weight = Merged(weight, update.rows)
    return weight


def fits_experts(update: Update, weight: Weight) -> bool:
    """Whether an update is for experts [E, out, in] of this shape, or for the same as [E, in, out]."""
    experts, out, width = weight.shape
    return update.experts == experts and update.shape in ((out, width), (width, out))


def merge_experts(weight: Weight, updates: Sequence[Update]) -> Weight:
    """Experts [E, out, in] with updates that fit them. Older releases of PEFT took experts to lie as [E, in, out]."""
    for update in updates:
        weight = Merged(weight, update.of_experts if update.shape == weight.shape[1:] else partial(_turned, update))
    return weight


def _turned(update: Update, start: int, stop: int) -> np.ndarray:
    return update.of_experts(start, stop).swapaxes(1, 2)


def _misfit(update: Update, weight: Weight) -> CheckpointError:
    found = f"{update.experts} of {list(update.shape)}" if update.experts > 1 else str(list(update.shape))
    return CheckpointError(
        f"the adapter's {one_line(update.module, 80)} is for {found}, the weight is {list(weight.shape)}"
    )
