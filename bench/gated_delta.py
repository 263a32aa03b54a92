"""Random calls of the gated delta rule as GPUs have it: packed inputs, states, and results held to the spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moevlm.export.formats.base import rounded
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.ops.gated_delta import gated_delta

Array = np.ndarray


def draw_inputs(op: GatedDeltaOp, lengths: Sequence[int], seed: int, padding: int = 0) -> dict[str, Array]:
    """Decays reach from none to nearly all of a state in one token; rows that no sequence has are NaN, row 0 too, and
    so is what lies beside the op's own columns.

    lengths: new tokens of each sequence. padding: so many of the sequences, the last, have row 0.
    """
    random, spec = np.random.default_rng(seed), op.spec
    tokens, heads, count = sum(lengths), spec.value_heads, len(lengths)
    rows = count + 3
    state_row = (1 + random.permutation(rows - 1)[:count]).astype(np.int32)
    state_row[count - padding :] = 0
    qkv, gates = (random.standard_normal((tokens, width)) for width in (spec.channels, 2 * heads))
    states = {
        "conv_state": random.standard_normal((rows, spec.kernel - 1, spec.channels)),
        "delta_state": random.standard_normal((rows, heads, spec.key_dim, spec.value_dim)),
    }
    unused = np.setdiff1d(np.arange(rows), state_row[state_row > 0])
    for state in states.values():
        state[unused] = np.nan
    inputs = states | {
        "x": np.concatenate([qkv, 2 * gates, np.full((tokens, op.beside), np.nan)], axis=1),
        "conv_weight": random.standard_normal((spec.channels, spec.kernel)),
        "rate": np.exp(random.uniform(-4, 2, heads)),
        "dt_bias": random.standard_normal(heads),
        "query_start": np.cumsum([0, *lengths]).astype(np.int32),
        "state_row": state_row,
    }
    return {t.name: inputs[t.name] if "int" in t.dtype else rounded(inputs[t.name], t.dtype) for t in op.inputs}


def deviation(op: GatedDeltaOp, inputs: Mapping[str, Array], results: Sequence[Array]) -> float:
    """How far y and the states are from the reference, relative Frobenius norm; infinite if any is not a number.

    inputs: as they were before the call. results: y, and the states after it. Raises ValueError where a row was
    written that no sequence has, and for a convolution's state that is not what it must be to the bit.
    """
    y, conv_state, delta_state = results
    spec, heads = op.spec, op.spec.value_heads
    qkv, a, b, _ = np.split(inputs["x"].astype(np.float64), spec.channels + heads * np.arange(3), axis=1)
    nobody = inputs["state_row"] == 0
    before = {name: inputs[name].astype(np.float64) for name in ("conv_state", "delta_state")}
    blank = [np.concatenate([state, np.zeros((nobody.sum(), *state.shape[1:]))]) for state in before.values()]
    rows = len(before["conv_state"])
    own_row = inputs["state_row"].copy()
    own_row[nobody] = rows + np.arange(nobody.sum())
    weights = [inputs[name] for name in ("conv_weight", "rate", "dt_bias")]
    want, want_conv, want_delta = gated_delta(qkv, a, b, *weights, *blank, inputs["query_start"], own_row, spec)
    if not np.array_equal(conv_state, want_conv[:rows].astype(np.float32), equal_nan=True):
        raise ValueError("conv_state does not hold the last inputs")
    lengths = np.diff(inputs["query_start"])
    changed = inputs["state_row"][(lengths > 0) & ~nobody]
    kept = np.setdiff1d(np.arange(rows), changed)
    if not np.array_equal(delta_state[kept], inputs["delta_state"][kept], equal_nan=True):
        raise ValueError("delta_state was written where no sequence has its row")
    pairs = [(y, want), (delta_state[changed], want_delta[changed])]
    far = [np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30) for ours, theirs in pairs]
    return float(max(far)) if np.isfinite(far).all() else float("inf")
