"""The experts in numpy: the spec that every kernel, lowering and graph is held to.

Written to be read, not to be fast. The experts accumulate in float64, so that a deviation from here is the other side's
rounding.
"""

from collections.abc import Callable

import numpy as np

from moevlm.plugins.ops.router import sigmoid
from moevlm.plugins.ops.spec import ExpertsSpec

Array = np.ndarray


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., n] times weight [m, n] transposed, plus bias [m] -> [..., m]: a row of `weight` makes one output."""
    y = x @ weight.T
    return y if bias is None else y + bias


def gelu_tanh(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks and Gimpel, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


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

    x: [T, H]. index, weight: [T, k], as `route` returns them; -1 is no expert, and adds nothing.
    gate_up: [E, 2I, H], gate rows first, then up rows ([E, I, H] if not gated); gate_up_bias: [E, 2I] (or [E, I]).
    down: [E, H, I]; down_bias: [E, H]. between: applied to activations [R, I] on their way into down.
    Returns y [T, H] in the dtype of x. With weight_on = "input" a token's row is scaled on its way into the expert, and
    the outputs are added as they are.
    """
    y = np.zeros(x.shape, np.float64)
    for e in np.unique(index[index >= 0]):
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
