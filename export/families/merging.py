"""Updates of an adapter added to weights as they are read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.lora.adapter import Update
from moevlm.export.graph.weights import Weight
from moevlm.runtime.core.errors import CheckpointError, one_line

_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Merged:
    """A matrix [out, in] and its update, float32."""

    source: Weight
    update: Update

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return _FLOAT32

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.source.rows(start, stop).astype(np.float32, copy=False) + self.update.rows(start, stop)


@dataclass(frozen=True)
class MergedExperts:
    """All experts of a layer [E, out, in] and their updates, float32. swapped: these are [E, in, out]."""

    source: Weight
    update: Update
    swapped: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return _FLOAT32

    def rows(self, start: int, stop: int) -> np.ndarray:
        change = self.update.of_experts(start, stop)
        return self.source.rows(start, stop).astype(np.float32, copy=False) + (
            change.swapaxes(1, 2) if self.swapped else change
        )


def merge(weight: Weight, updates: Sequence[Update]) -> Weight:
    """A module's weight [out, in] with its updates. Raises CheckpointError for one of another shape."""
    for update in updates:
        if update.experts != 1 or update.shape != weight.shape:
            raise _misfit(update, weight)
        weight = Merged(weight, update)
    return weight


def fits_experts(update: Update, weight: Weight) -> bool:
    """Whether an update is for experts [E, out, in] of this shape, or for the same as [E, in, out]."""
    experts, out, width = weight.shape
    return update.experts == experts and update.shape in ((out, width), (width, out))


def merge_experts(weight: Weight, updates: Sequence[Update]) -> Weight:
    """Experts [E, out, in] with updates that fit them. Older releases of PEFT took experts to lie as [E, in, out]."""
    for update in updates:
        weight = MergedExperts(weight, update, swapped=update.shape != weight.shape[1:])
    return weight


def _misfit(update: Update, weight: Weight) -> CheckpointError:
    found = f"{update.experts} of {list(update.shape)}" if update.experts > 1 else str(list(update.shape))
    return CheckpointError(
        f"the adapter's {one_line(update.module, 80)} is for {found}, the weight is {list(weight.shape)}"
    )
