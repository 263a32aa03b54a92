"""The gated delta rule behind a short convolution, in numpy: the spec that every kernel, lowering and graph is held to.

Written to be read, not to be fast: token after token, in float64.
"""

from itertools import pairwise

import numpy as np

from moevlm.plugins.ops.spec import GatedDeltaSpec

Array = np.ndarray


def gated_delta(
    qkv: Array,
    a: Array,
    b: Array,
    conv_weight: Array,
    rate: Array,
    dt_bias: Array,
    conv_state: Array,
    delta_state: Array,
    query_start: Array,
    state_row: Array,
    spec: GatedDeltaSpec,
) -> tuple[Array, Array, Array]:
    """A causal convolution over each channel, then S = exp(g) S + k beta (v - k exp(g) S), y = q S, for each head.

    Source: Yang et al. 2025, Gated Delta Networks, equation 10; g = -rate * softplus(a + dt_bias), beta = sigmoid(b).
    q and k are divided by their Euclidean length. Hv / Hk value heads side by side share a query and a key.

    qkv: [T, C], C = 2 * Hk * Dk + Hv * Dv: queries, keys and values before the convolution. a, b: [T, Hv].
    conv_weight: [C, kernel], the newest token's weight last. rate, dt_bias: [Hv].
    conv_state: [rows, kernel - 1, C], the last inputs of the convolution, the newest last.
    delta_state: [rows, Hv, Dk, Dv]. query_start: [N + 1]; state_row: [N], each sequence's row in both states.
    Returns y [T, Hv * Dv] in the dtype of qkv, and new states in theirs.
    """
    conv_state, delta_state = conv_state.copy(), delta_state.copy()
    y = np.zeros((len(qkv), spec.value_heads * spec.value_dim))
    for row, (start, stop) in zip(state_row.tolist(), pairwise(query_start.tolist()), strict=True):
        if start == stop:
            continue
        taken = np.concatenate([conv_state[row], qkv[start:stop]]).astype(np.float64)
        conv_state[row] = taken[stop - start :]
        mixed = _silu(sum(taken[j : j + stop - start] * conv_weight[:, j] for j in range(spec.kernel)))
        state = delta_state[row].astype(np.float64)
        for t in range(start, stop):
            q, k, v = _heads(mixed[t - start], spec)
            decay = np.exp(-rate.astype(np.float64) * np.logaddexp(0, a[t].astype(np.float64) + dt_bias))
            beta = 1 / (1 + np.exp(-b[t].astype(np.float64)))
            state = decay[:, None, None] * state
            kept = np.einsum("hk,hkv->hv", k, state)
            state = state + k[:, :, None] * (beta[:, None] * (v - kept))[:, None, :]
            y[t] = np.einsum("hk,hkv->hv", q, state).reshape(-1)
        delta_state[row] = state
    return y.astype(qkv.dtype), conv_state, delta_state


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _heads(row: Array, spec: GatedDeltaSpec) -> tuple[Array, Array, Array]:
    """One token's channels -> q, k [Hv, Dk] and v [Hv, Dv]."""
    width = spec.key_heads * spec.key_dim
    q, k = (row[i * width : (i + 1) * width].reshape(spec.key_heads, spec.key_dim) for i in (0, 1))
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + spec.epsilon) for x in (q, k))
    shared = spec.value_heads // spec.key_heads
    q, k = (np.repeat(x, shared, axis=0) for x in (q * (spec.scale or spec.key_dim**-0.5), k))
    return q, k, row[2 * width :].reshape(spec.value_heads, spec.value_dim)
