"""Variants of the gated delta rule, and random inputs for them: every kernel and graph is tried with these."""

from __future__ import annotations

import numpy as np

from moevlm.plugins.ops.spec import GatedDeltaSpec

Array = np.ndarray

DELTAS = {
    "plain": GatedDeltaSpec(key_heads=2, value_heads=2, key_dim=16, value_dim=16, kernel=4),
    "shared_keys": GatedDeltaSpec(key_heads=2, value_heads=6, key_dim=32, value_dim=16, kernel=4),
    "wide_values": GatedDeltaSpec(key_heads=1, value_heads=2, key_dim=8, value_dim=24, kernel=2),
    "scaled": GatedDeltaSpec(key_heads=3, value_heads=3, key_dim=24, value_dim=40, kernel=3, scale=0.7, epsilon=1e-3),
}
# Tokens of each sequence in a step: one prompt, decoding, a mixture with an empty sequence, chunks of kernels.
STEPS = {"prompt": (37,), "decode": (1, 1, 1), "mixed": (3, 1, 0, 70, 1), "short": (2, 1, 3)}
ROWS = 7


def delta_inputs(spec: GatedDeltaSpec, lengths: tuple[int, ...], seed: int = 0) -> dict[str, Array]:
    """Arguments of `plugins.ops.gated_delta.gated_delta` but the spec: each sequence's row holds something already.

    Decays reach from none to nearly all of a state in one token.
    """
    rng = np.random.RandomState(seed)
    tokens, heads, channels = sum(lengths), spec.value_heads, spec.channels

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "qkv": normal(tokens, channels),
        "a": 2 * normal(tokens, heads),
        "b": 2 * normal(tokens, heads),
        "conv_weight": normal(channels, spec.kernel),
        "rate": np.exp(rng.uniform(-4, 2, heads)).astype(np.float32),
        "dt_bias": normal(heads),
        "conv_state": normal(ROWS, spec.kernel - 1, channels),
        "delta_state": normal(ROWS, heads, spec.key_dim, spec.value_dim),
        "query_start": np.cumsum([0, *lengths]).astype(np.int32),
        "state_row": (1 + rng.permutation(ROWS - 1)[: len(lengths)]).astype(np.int32),
    }
