"""The numpy spec of the gated delta rule: a case computed by hand, Hugging Face's own layer, and steps of all kinds."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

from moevlm.plugins.ops.gated_delta import gated_delta
from moevlm.plugins.ops.spec import GatedDeltaSpec
from moevlm.runtime.core.errors import FieldError
from tests.support.delta_variants import DELTAS, STEPS, delta_inputs

HF_TOLERANCE = 2e-5  # two computations in float32, and one in float64
KEYWORDS = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}


def test_a_token_replaces_what_its_key_held_by_its_value_in_part():
    spec = GatedDeltaSpec(key_heads=1, value_heads=1, key_dim=2, value_dim=1, kernel=2, scale=1.0, epsilon=1e-12)
    one, zero = np.float32(1.2784645), np.float32(0)  # silu(1.2784645) = 1
    qkv = np.array([[one, zero, one, zero, one]], np.float32)
    y, conv, state = gated_delta(
        *(qkv, np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)),  # softplus(0) = log 2, sigmoid(0) = 1/2
        *(np.tile(np.float32([0, 1]), (5, 1)), np.ones(1, np.float32), np.zeros(1, np.float32)),
        *(np.zeros((2, 1, 5), np.float32), np.full((2, 1, 2, 1), 4, np.float32)),
        *(np.array([0, 1]), np.array([1])),
        spec=spec,
    )
    # exp(-log 2) halves the state to 2; half of the way from 2 to the value 1 is 1.5; the other key keeps its 2.
    np.testing.assert_allclose(state[1, 0, :, 0], [1.5, 2], rtol=1e-6)
    np.testing.assert_allclose(y, [[1.5]], rtol=1e-6)
    assert conv[1].tolist() == qkv.tolist()
    assert (state[0] == 4).all()
    assert not conv[0].any()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("variant", ["plain", "shared_keys", "wide_values"])
def test_equals_the_convolution_and_the_rule_of_transformers(variant, step):
    spec, inputs = DELTAS[variant], delta_inputs(DELTAS[variant], STEPS[step])
    y, conv, state = gated_delta(**inputs, spec=spec)
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for row, (start, stop) in zip(inputs["state_row"], pairwise(inputs["query_start"].tolist()), strict=True):
        if start == stop:
            np.testing.assert_array_equal(state[row], inputs["delta_state"][row])
            continue
        taken = torch.cat([given["conv_state"][row], given["qkv"][start:stop]]).T
        mixed = F.silu(F.conv1d(taken[None], given["conv_weight"][:, None], groups=len(taken))[0].T)
        width = spec.key_heads * spec.key_dim
        q, k, v = (
            part.unflatten(1, (heads, -1))[None]
            for part, heads in zip(
                mixed.split([width, width, spec.value_heads * spec.value_dim], 1),
                (spec.key_heads, spec.key_heads, spec.value_heads),
                strict=True,
            )
        )
        g = -given["rate"] * F.softplus(given["a"][start:stop] + given["dt_bias"])
        beta = given["b"][start:stop].sigmoid()
        for rule in (hf.torch_chunk_gated_delta_rule, hf.torch_recurrent_gated_delta_rule):
            wanted, last = rule(
                q, k, v, g=g[None], beta=beta[None], initial_state=given["delta_state"][row, None], **KEYWORDS
            )
            np.testing.assert_allclose(y[start:stop], wanted[0].flatten(1), rtol=0, atol=HF_TOLERANCE * np.abs(y).max())
            np.testing.assert_allclose(state[row], last[0], rtol=0, atol=HF_TOLERANCE * np.abs(state).max())
        np.testing.assert_array_equal(conv[row], taken.T[stop - start :])


@pytest.mark.parametrize("variant", DELTAS)
def test_a_prompt_in_chunks_equals_the_whole_prompt(variant):
    spec, inputs = DELTAS[variant], delta_inputs(DELTAS[variant], (23,))
    whole = gated_delta(**inputs, spec=spec)
    parts, states = [], (inputs["conv_state"], inputs["delta_state"])
    for start, stop in pairwise((0, 1, 9, 10, 23)):
        rows = {name: inputs[name][start:stop] for name in ("qkv", "a", "b")}
        kept = {"conv_state": states[0], "delta_state": states[1], "query_start": np.array([0, stop - start])}
        y, *states = gated_delta(**inputs | rows | kept, spec=spec)
        parts.append(y)
    for found, wanted in zip((np.concatenate(parts), *states), whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_heads_and_kernels_that_do_not_fit_are_refused():
    with pytest.raises(FieldError, match="key_heads = 2"):
        GatedDeltaSpec(key_heads=2, value_heads=3, key_dim=8, value_dim=8, kernel=4)
    for field in ("value_heads", "key_dim", "value_dim"):
        with pytest.raises(FieldError, match=f"{field} = 0"):
            replace(DELTAS["plain"], **{field: 0})
    with pytest.raises(FieldError, match="kernel = 1"):
        GatedDeltaSpec(key_heads=1, value_heads=1, key_dim=8, value_dim=8, kernel=1)
