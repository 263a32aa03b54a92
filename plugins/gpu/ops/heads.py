"""Heads of queries and keys, as attention's kernels are specialised to them."""

from dataclasses import dataclass

from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES
from moevlm.runtime.core.errors import FieldError

HEAD_DIMS = range(4, 257, 2)  # of attention among patches


@dataclass(frozen=True)
class Heads:
    """dim: of a query or key, in two parts as wide as matrix products take them: `first`, and `rest` or 0.

    rotary_start, half: the first dimension that is rotated, and half of how many are. epsilon: of norms, if has_norms.
    All are fields: Triton compiles a kernel anew when what it is specialised to prints otherwise.
    """

    dim: int
    first: int
    rest: int
    rotary_start: int
    half: int
    epsilon: float
    has_norms: bool


def parts(dim: int) -> tuple[int, int]:
    """Powers of two, at least 16, or 0 for the second, that have room for a head: the least in all, then the fewest."""
    wide = max(16, 1 << dim.bit_length() - 1)
    if dim <= wide:
        return wide, 0
    narrow = max(16, 1 << (dim - wide - 1).bit_length())
    return (2 * wide, 0) if narrow == wide else (wide, narrow)


def require_heads(heads: int, head_dim: int, dtype: str) -> None:
    """Raise FieldError for heads that attention to patches does not take."""
    if dtype not in ACTIVATION_DTYPES:
        raise FieldError("dtype", dtype, ", ".join(map(repr, ACTIVATION_DTYPES)))
    if heads < 1:
        raise FieldError("heads", heads, "1 or more")
    if head_dim not in HEAD_DIMS:
        raise FieldError("head_dim", head_dim, f"an even number from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}")
