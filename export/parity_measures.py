"""How far two float arrays of one shape are apart: infinitely, where one is not finite or has another shape."""

import numpy as np

Array = np.ndarray


def kl_divergences(ours: Array, theirs: Array) -> Array:
    """Per position KL(theirs || ours) of logits [..., vocabulary], nats."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return np.full(1, np.inf)
    p, q = log_softmax(theirs), log_softmax(ours)
    return (np.exp(p) * (p - q)).sum(-1)


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
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))
