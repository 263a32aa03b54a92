"""How far two float arrays of one shape are apart: infinitely, where one is not finite or has another shape."""

from collections.abc import Iterator

import numpy as np

Array = np.ndarray

# Logits of a large vocabulary are hundreds of megabytes, and every temporary would be as large again.
_PIECE = 4 << 20  # elements


def kl_divergences(ours: Array, theirs: Array) -> Array:
    """Per position KL(theirs || ours) of logits [..., vocabulary], nats."""
    if ours.shape != theirs.shape:
        return np.full(1, np.inf)
    found = [np.zeros(0)]
    for mine, other in _pieces(ours, theirs):
        if not (np.isfinite(mine).all() and np.isfinite(other).all()):
            return np.full(1, np.inf)
        p, q = log_softmax(other), log_softmax(mine)
        found.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(found).reshape(ours.shape[:-1])


def log_softmax(logits: Array) -> Array:
    """log(softmax) over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rms_error(ours: Array, theirs: Array) -> float:
    """Root mean square of the difference over that of theirs."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), np.finfo(np.float32).tiny))


def relative_error(ours: Array, theirs: Array) -> float:
    """Largest absolute difference over the largest absolute value."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference, largest = 0.0, float(np.finfo(np.float32).tiny)
    for mine, other in _pieces(ours, theirs):
        if not (np.isfinite(mine).all() and np.isfinite(other).all()):
            return float("inf")
        difference = max(difference, float(np.abs(mine - other).max(initial=0)))
        largest = max(largest, float(np.abs(other).max(initial=0)))
    return difference / largest


def _pieces(ours: Array, theirs: Array) -> Iterator[tuple[Array, Array]]:
    """Both in rows of the last axis, some at a time."""
    columns = ours.shape[-1] if ours.ndim else 1
    step = max(1, _PIECE // max(1, columns))
    mine, other = ours.reshape(-1, max(1, columns)), theirs.reshape(-1, max(1, columns))
    for start in range(0, len(mine), step):
        yield mine[start : start + step], other[start : start + step]
