"""Options of the targets reference and ort-cpu."""

from dataclasses import dataclass

from moevlm.export.backends.options import check_choices, group_size, sparsity
from moevlm.export.formats.registry import INTEGERS

NAMES = ("reference", "ort-cpu", *(f"ort-cpu:{name}" for name in INTEGERS))
PLANNED = NAMES


@dataclass(frozen=True)
class Options:
    """group_size: weights that share a scale, where they are quantized. sparsity: "2:4" to prune the dense layers.

    Raises BuildError for a value that is not allowed.
    """

    group_size: int = group_size(lambda target, _: target.endswith(tuple(INTEGERS)))
    sparsity: str = sparsity()

    def __post_init__(self) -> None:
        check_choices(self)
