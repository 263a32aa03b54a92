"""The router in numpy: the spec that every kernel, lowering and graph is held to.

Written to be read, not to be fast. Routing is float32, as in every model, because ties and near ties must fall the same
way everywhere.
"""

import numpy as np

from moevlm.plugins.ops.spec import RouterSpec

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), in the dtype of x, without overflow at either end."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis, in the dtype of x."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


SCORING = {"softmax": softmax, "sigmoid": sigmoid}


def top(scores: Array, k: int) -> Array:
    """Indices of the k largest along the last axis, the largest first, ties to the lower index: [..., k]."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def route(
    logits: Array, spec: RouterSpec, bias: Array | None = None, expert_scale: Array | None = None
) -> tuple[Array, Array]:
    """Choose k experts per token and their weights.

    logits: [T, E] float32, the router's output before any scoring.
    bias:   [E] float32, added to the scores for the choice only (DeepSeek-V3, eq. 16).
    expert_scale: [E] float32, factors on the weights of the chosen experts, after everything else (Gemma 4).
    Returns (index [T, k] int32, weight [T, k] float32), the highest choice score first, ties to the lower index.
    """
    spec.check(logits.shape[1])
    choice = choice_scores(logits, spec, bias)
    if spec.n_group > 1:
        choice = _mask_groups(choice, spec)
    index = top(choice, spec.top_k)
    return index.astype(np.int32), weigh(logits, index, spec, expert_scale)


def choice_scores(logits: Array, spec: RouterSpec, bias: Array | None = None) -> Array:
    """The scores that experts are chosen by, [T, E] float32, the bias included. Groups are not looked at."""
    scores = _scores(logits, spec)
    return scores if bias is None else scores + bias.astype(np.float32)


def weigh(logits: Array, index: Array, spec: RouterSpec, expert_scale: Array | None = None) -> Array:
    """The weights [T, k] float32 of the experts `index` [T, k], whoever chose them. expert_scale: as in `route`."""
    weight = np.take_along_axis(_scores(logits, spec), index, axis=1)
    if spec.scoring == "softmax_after_topk":
        weight = softmax(weight)
    if spec.renormalize:
        weight = weight / (weight.sum(axis=1, keepdims=True) + np.float32(spec.epsilon))
    weight = weight * np.float32(spec.scale)
    return weight if expert_scale is None else weight * expert_scale.astype(np.float32)[index]


def _scores(logits: Array, spec: RouterSpec) -> Array:
    logits = logits.astype(np.float32)
    return logits if spec.scoring == "softmax_after_topk" else SCORING[spec.scoring](logits)


def group_scores(choice: Array, spec: RouterSpec) -> Array:
    """The scores that groups are chosen by, [T, n_group], from choice scores [T, E]."""
    tokens, experts = choice.shape
    best = -np.sort(-choice.reshape(tokens, spec.n_group, experts // spec.n_group), axis=2)
    return best[:, :, 0] if spec.group_score == "max" else best[:, :, 0] + best[:, :, 1]


def _mask_groups(choice: Array, spec: RouterSpec) -> Array:
    """Choice scores [T, E] with -inf at every expert outside the token's best topk_group groups."""
    tokens, experts = choice.shape
    kept = np.zeros((tokens, spec.n_group), bool)
    np.put_along_axis(kept, top(group_scores(choice, spec), spec.topk_group), True, axis=1)
    return np.where(np.repeat(kept, experts // spec.n_group, axis=1), choice, np.float32(-np.inf))
