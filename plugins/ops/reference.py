"""Both MoE ops in numpy: the spec that every kernel, lowering and graph is held to.

Written to be read, not to be fast. Routing is float32, as in every model, because ties and near ties must fall the same
way everywhere; the experts accumulate in float64, so that a deviation from here is the other side's rounding.
"""

from collections.abc import Callable

import numpy as np

from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec

Array = np.ndarray


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., n] times weight [m, n] transposed, plus bias [m] -> [..., m]: a row of `weight` makes one output."""
    y = x @ weight.T
    return y if bias is None else y + bias


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), in the dtype of x, without overflow at either end."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis, in the dtype of x."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


SCORING = {"softmax": softmax, "sigmoid": sigmoid}


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks and Gimpel, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def top(scores: Array, k: int) -> Array:
    """Indices of the k largest along the last axis, the largest first, ties to the lower index: [..., k]."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def route(logits: Array, spec: RouterSpec, bias: Array | None = None) -> tuple[Array, Array]:
    """Choose k experts per token and their weights.

    logits: [T, E] float32, the router's output before any scoring.
    bias:   [E] float32, added to the scores for the choice only (DeepSeek-V3, eq. 16).
    Returns (index [T, k] int32, weight [T, k] float32), the highest choice score first, ties to the lower index.
    """
    spec.check(logits.shape[1])
    choice = choice_scores(logits, spec, bias)
    if spec.n_group > 1:
        choice = _mask_groups(choice, spec)
    index = top(choice, spec.top_k)
    return index.astype(np.int32), weigh(logits, index, spec)


def choice_scores(logits: Array, spec: RouterSpec, bias: Array | None = None) -> Array:
    """The scores that experts are chosen by, [T, E] float32, the bias included. Groups are not looked at."""
    scores = _scores(logits, spec)
    return scores if bias is None else scores + bias.astype(np.float32)


def weigh(logits: Array, index: Array, spec: RouterSpec) -> Array:
    """The weights [T, k] float32 of the experts `index` [T, k], whoever chose them."""
    weight = np.take_along_axis(_scores(logits, spec), index, axis=1)
    if spec.scoring == "softmax_after_topk":
        weight = softmax(weight)
    if spec.renormalize:
        weight = weight / (weight.sum(axis=1, keepdims=True) + np.float32(spec.epsilon))
    return weight * np.float32(spec.scale)


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


def experts(
    x: Array,
    index: Array,
    weight: Array,
    gate_up: Array,
    down: Array,
    spec: ExpertsSpec,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    between: Callable[[Array], Array] = lambda activated: activated,
) -> Array:
    """Send each token through its experts and add their outputs.

    x: [T, H]. index, weight: [T, k], as `route` returns them.
    gate_up: [E, 2I, H], gate rows first, then up rows ([E, I, H] if not gated); gate_up_bias: [E, 2I] (or [E, I]).
    down: [E, H, I]; down_bias: [E, H]. between: applied to activations [R, I] on their way into down.
    Returns y [T, H] in the dtype of x. With weight_on = "input" a token's row is scaled on its way into the expert, and
    the outputs are added as they are.
    """
    y = np.zeros(x.shape, np.float64)
    for e in np.unique(index):
        token, slot = np.nonzero(index == e)
        rows = x[token].astype(np.float64)
        scale = weight[token, slot, None].astype(np.float64)
        if spec.weight_on == "input":
            rows = rows * scale
        projected = linear(rows, gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        out = linear(between(activate(projected, spec)), down[e], None if down_bias is None else down_bias[e])
        np.add.at(y, token, out if spec.weight_on == "input" else out * scale)
    return y.astype(x.dtype)


def activate(projected: Array, spec: ExpertsSpec) -> Array:
    """The middle of an expert: [R, 2I] (gate, then up) -> [R, I] if gated, else [R, I] -> [R, I]."""
    gate, up = np.split(projected, 2, axis=1) if spec.gated else (projected, 1.0)
    if spec.activation == "gelu_tanh":
        return gelu_tanh(gate) * up
    if spec.activation == "silu":
        return gate * sigmoid(gate) * up
    gate = np.minimum(gate, spec.limit)
    up = np.clip(up, -spec.limit, spec.limit)
    return gate * sigmoid(spec.alpha * gate) * (up + 1)
