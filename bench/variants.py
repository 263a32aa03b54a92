"""The variants of both MoE ops, and inputs for them: what each implementation is tested with, kernels and graphs alike.

Inputs come from `RandomState`, whose stream numpy has frozen (NEP 19), so a seed in a golden stays the same data.
"""

from itertools import product

import numpy as np

from moevlm.plugins.ops.spec import ACTIVATIONS, GROUP_SCORES, SCORINGS, WEIGHT_SIDES, ExpertsSpec, RouterSpec

EXPERTS = 8
# An epsilon that shows in the result: the 1e-20 of real models would hide a body that forgot it.
NORMS = {"raw": (False, 0.0), "renorm": (True, 0.0), "eps": (True, 0.05)}
GROUPS = {"flat": (1, 1, "max"), **{score: (4, 2, score) for score in GROUP_SCORES}}

ROUTERS: dict[str, RouterSpec] = {
    f"{scoring}-{norm}-x{scale}-{groups}": RouterSpec(
        top_k=3,
        scoring=scoring,
        renormalize=NORMS[norm][0],
        epsilon=NORMS[norm][1],
        scale=scale,
        n_group=GROUPS[groups][0],
        topk_group=GROUPS[groups][1],
        group_score=GROUPS[groups][2],
    )
    for scoring, norm, scale, groups in product(SCORINGS, NORMS, (1.0, 2.5), GROUPS)
}
"""Every combination of the router's attributes, for EXPERTS experts."""

MODELS: dict[str, RouterSpec] = {
    "qwen3_vl_moe": RouterSpec(top_k=2),
    "glm4v_moe": RouterSpec(top_k=2, scoring="sigmoid", epsilon=1e-20, scale=1.5, group_score="top2_sum"),
    "deepseek_v2": RouterSpec(top_k=2, renormalize=False, scale=2.0, n_group=4, topk_group=2),
    "deepseek_v3": RouterSpec(
        top_k=2, scoring="sigmoid", epsilon=1e-20, scale=2.5, n_group=4, topk_group=2, group_score="top2_sum"
    ),
    "mistral4": RouterSpec(top_k=2, epsilon=1e-20, n_group=2, topk_group=1, group_score="top2_sum"),
    "gpt_oss": RouterSpec(top_k=2, scoring="softmax_after_topk", renormalize=False),
    "llama4": RouterSpec(top_k=1, scoring="sigmoid", renormalize=False),
}
"""Routers as the Hugging Face models of these names have them."""

BLOCKS: dict[str, ExpertsSpec] = {
    f"{activation}-{'gated' if gated else 'plain'}-{side}": ExpertsSpec(activation, gated, side, limit=0.75)
    for activation, gated, side in product(ACTIVATIONS, (True, False), WEIGHT_SIDES)
    if gated or activation != "swiglu_clamped"
}
"""Every combination of the experts' attributes; the limit is low enough to clamp some of the test values."""


def router_inputs(
    tokens: int, has_bias: bool = True, experts: int = EXPERTS, seed: int = 0, has_scale: bool = False
) -> dict[str, np.ndarray]:
    """logits [T, E] float32 and, as asked for, bias [E] and expert_scale [E] float32, of either sign."""
    draw = np.random.RandomState(seed).standard_normal
    inputs = {"bias": draw(experts) * 0.3, "logits": draw((tokens, experts)) * 1.5, "expert_scale": draw(experts)}
    given = {"logits": True, "bias": has_bias, "expert_scale": has_scale}
    return {name: inputs[name].astype(np.float32) for name, wanted in given.items() if wanted}


def expert_weights(
    spec: ExpertsSpec, has_biases: bool, hidden: int = 12, inner: int = 6, experts: int = EXPERTS, seed: int = 0
) -> dict[str, np.ndarray]:
    """gate_up [E, 2I, H] (not gated: [E, I, H]), down [E, H, I] and their biases, float32, by the op's input names."""
    draw = np.random.RandomState(seed).standard_normal
    rows = inner * (2 if spec.gated else 1)
    weights = {"gate_up": draw((experts, rows, hidden)) * hidden**-0.5, "down": draw((experts, hidden, inner))}
    if has_biases:
        weights |= {"gate_up_bias": draw((experts, rows)) * 0.5, "down_bias": draw((experts, hidden)) * 0.5}
    return {name: array.astype(np.float32) for name, array in weights.items()}


def hidden_states(tokens: int, hidden: int = 12, seed: int = 0) -> np.ndarray:
    """x [T, H] float32."""
    return np.random.RandomState(seed).standard_normal((tokens, hidden)).astype(np.float32)
