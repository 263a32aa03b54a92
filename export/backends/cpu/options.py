"""Options of the cpu targets."""

from dataclasses import dataclass

from moevlm.export.backends.options import Option, check_choices, group_size, option, sparsity
from moevlm.export.formats.registry import INTEGERS
from moevlm.runtime.core import defaults

NAMES = tuple(f"cpu:{name}" for name in INTEGERS)
PLANNED = NAMES
_KV_CACHE = Option(
    "cpu: keys and values in float32, or in int8 with a scale per token and head; int8 by default, but float32 for the "
    "latents of MLA.",
    "cpu targets",
    choices=("float32", "int8"),
)


@dataclass(frozen=True)
class Options:
    """group_size: weights that share a scale. kv_cache: see `states.cache_dtype`. sparsity: "2:4" to prune.

    Raises BuildError for a value that is not allowed.
    """

    group_size: int = group_size(lambda _target, _values: True)
    kv_cache: str = option(defaults.KV_CACHE, _KV_CACHE)
    sparsity: str = sparsity()

    def __post_init__(self) -> None:
        check_choices(self)
