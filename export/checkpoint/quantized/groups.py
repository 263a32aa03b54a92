"""Groups of integers along a row: their size, and groups whose weights do not lie side by side."""

from dataclasses import dataclass

import numpy as np

from moevlm.export.checkpoint.quantized.layout import Parts, wrong_shape, wrong_value
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import FLOAT, Coded, numbers_of
from moevlm.runtime.core.errors import CheckpointError

_SMALLEST = 8  # group of which the config says nothing


def group_size_of(parts: Parts, scales: Stored, width: int, groups: int) -> int:
    """The weights of a row that share a scale: as the config says, where it does, and the scales have to agree.

    Raises CheckpointError for another number of groups.
    """
    stated = parts.scheme.group_size
    if stated is not None:
        size = min(stated or width, width)  # codes are filled up to whole groups
        if -(-width // size) != groups:
            raise wrong_shape(
                scales, f"{-(-width // size)} groups of {size} in the place of {groups}, for rows of {width}"
            )
        return size
    size = width // max(1, groups)
    if groups != 1 and (size < _SMALLEST or size & (size - 1) or size * groups != width):
        raise wrong_shape(scales, f"groups of a power of 2 from {_SMALLEST} on, for rows of {width}")
    return size


def require_symmetric(parts: Parts, ending: str) -> None:
    """Raise CheckpointError where the config says that groups have zeros, and no tensor has them."""
    if parts.scheme.symmetric is False:
        raise CheckpointError(
            f"the checkpoint lacks tensor {parts.name}{ending}, though {parts.settings.source} says that weights are "
            "not symmetric"
        )


def require_side_by_side(parts: Parts, groups: int, ending: str) -> None:
    """Raise CheckpointError where the config says that groups are scattered, and no tensor says how."""
    if parts.scheme.scattered and groups > 1:
        raise CheckpointError(
            f"the checkpoint lacks tensor {parts.name.removesuffix('.weight')}{ending}, though {parts.settings.source} "
            "says that weights are ordered by activations"
        )


def scattered(parts: Parts, width: int, groups: int, group_size: int) -> np.ndarray | None:
    """The group of each column [K] as `index` has it; None if every group is a run of columns, as without it.

    Raises CheckpointError where it names a group that is not there.
    """
    parts.of_dtype("index", "int32", "int64")
    index = parts.of_shape("index", (width,))
    group = index.rows(0, width).astype(np.int64)
    if group.min() < 0 or group.max() >= groups:
        wrong = group[(group < 0) | (group >= groups)][0]
        raise wrong_value(index, f"the group {wrong}", f"0 to {groups - 1}")
    return None if np.array_equal(group, np.arange(width) // group_size) else group


@dataclass(frozen=True)
class Regrouped:
    """Codes [.., N, K] whose column k belongs to group[k] (GPTQ's desc_act): decodes, and has no codes to hand on."""

    source: Coded
    group: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def kind(self) -> str:
        """As of `Coded`."""
        return f"{self.source.kind} in scattered groups"

    @property
    def dtype(self) -> np.dtype:
        return FLOAT

    def rows(self, start: int, stop: int) -> np.ndarray:
        found = self.source.codes(start, stop)
        codes = found.codes.reshape(*found.scales.shape[:-1], -1)[..., : self.shape[-1]]
        values = numbers_of(codes, self.source.form)
        if found.zeros is not None:
            values -= np.take(found.zeros, self.group, -1)
        values *= np.take(found.scales, self.group, -1)
        return values
