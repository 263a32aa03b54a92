"""Ops that between them use every branch of the kernels, and fresh inputs for them with what the spec says of those."""

from itertools import cycle, islice

import numpy as np
import torch

from bench import variants
from moevlm.export.formats.base import rounded
from moevlm.export.formats.gpu_packing import pack, pack_scales, unpack
from moevlm.export.formats.registry import weight_format
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES, FORMATS, GROUP_SIZES, ExpertsOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import RouterSpec

Op = RouterOp | ExpertsOp
# experts, k, hidden, inner: round, with short last groups, and odd.
SIZES = ((16, 4, 256, 128), (8, 2, 136, 72), (24, 3, 101, 51))
STORED = (("", GROUP_SIZES[0]), *((weights, size) for weights in FORMATS if weights for size in GROUP_SIZES))
BEYOND = 40  # tokens past a variant's limit, for the last one, which has none
# Relative Frobenius norm of the deviation from the spec in float64, whose inputs are the kernel's own rounded ones.
ALLOWED = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
NEAR_TIE = 1e-5  # logits are as good as equal if so small a relative change makes the spec choose otherwise


def router_ops() -> list[RouterOp]:
    """Every combination of attributes, and each model's router with a bias and with an odd number of experts."""
    ops = [RouterOp(spec, variants.EXPERTS, has_bias) for spec in variants.ROUTERS.values() for has_bias in (0, 1)]
    return ops + [RouterOp(spec, experts, True) for spec in variants.MODELS.values() for experts in (60, 256)]


def experts_ops(sm: int) -> list[ExpertsOp]:
    """Every dtype with every format of weights, and every combination of the experts' attributes."""
    dtypes = [dtype for dtype in ACTIVATION_DTYPES if sm >= 80 or dtype != "bfloat16"]
    blocks = [(spec, has_biases) for spec in variants.BLOCKS.values() for has_biases in (False, True)]
    stored = [(dtype, *format_) for dtype in dtypes for format_ in STORED]
    count = 2 * max(len(blocks), len(stored))  # twice: each meets others the second time, as their numbers differ
    return [
        ExpertsOp(spec, experts, top_k, hidden, inner, dtype, weights, group_size, has_biases)
        for (spec, has_biases), (dtype, weights, group_size), (experts, top_k, hidden, inner) in islice(
            zip(cycle(blocks), cycle(stored), cycle(SIZES), strict=False), count
        )
    ]


def token_counts(draft: Draft) -> list[int]:
    """Numbers of tokens that use every variant of a draft, the last one beyond the others' limits."""
    limits = [variant.max_tokens for variant in draft.variants]
    return sorted({1, 5, *limits[:-1], *(limit + 1 for limit in limits[:-1]), max([0, *limits[:-1]]) + BEYOND})


def describe(op: Op) -> str:
    """An op in one line: what it was specialised to."""
    spec = op.spec
    if isinstance(op, RouterOp):
        groups = f" {spec.topk_group}/{spec.n_group} groups by {spec.group_score}" if spec.n_group > 1 else ""
        norm = f" renormalized +{spec.epsilon:g}" if spec.renormalize else ""
        bias = " bias" if op.has_bias else ""
        return f"router E{op.experts} k{spec.top_k} {spec.scoring}{norm} x{spec.scale:g}{groups}{bias}"
    weights = f" {op.weights}/{op.group_size}" if op.weights else ""
    kind = f"{spec.activation}{' gated' if spec.gated else ''} on {spec.weight_on}"
    biases = " biases" if op.has_biases else ""
    return f"experts E{op.experts} k{op.top_k} H{op.hidden} I{op.inner} {op.dtype}{weights} {kind}{biases}"


def router_case(op: RouterOp, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """logits and bias, if it has one."""
    return variants.router_inputs(tokens, op.has_bias, op.experts, seed)


def experts_case(op: ExpertsOp, tokens: int, seed: int, skewed: bool = False) -> tuple[list[torch.Tensor], np.ndarray]:
    """(inputs in the op's order, y by the spec). skewed: every token goes to the same experts."""
    logits = variants.router_inputs(tokens, False, op.experts, seed)["logits"]
    index, weight = route(logits, RouterSpec(op.top_k))
    if skewed:
        index = np.broadcast_to(index[:1], index.shape).copy()
    x = rounded(variants.hidden_states(tokens, op.hidden, seed + 1), op.dtype)
    drawn = variants.expert_weights(op.spec, op.has_biases, op.hidden, op.inner, op.experts, seed + 2)
    arrays: dict[str, np.ndarray] = {"x": x, "expert_index": index, "expert_weight": weight}
    meant: dict[str, np.ndarray] = {}
    for name, array in drawn.items():
        if op.weights and name in ("gate_up", "down"):
            form = weight_format(op.weights, op.group_size, op.dtype)
            codes, found = form.encode(array.reshape(-1, array.shape[-1]))
            stored = pack(codes, op.weights).reshape(*array.shape[:2], -1)
            scales = pack_scales(found.reshape(*array.shape[:2], -1))
            arrays |= {name: stored, f"{name}_scale": scales}
            meant[name] = unpack(stored, scales, form, array.shape[-1])
        else:
            arrays[name] = meant[name] = rounded(array, op.dtype)
    y = reference_experts(x.astype(np.float64), index, weight, spec=op.spec, **meant)
    return [torch.from_numpy(arrays[t.name]).to(getattr(torch, t.dtype)) for t in op.inputs], y


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative Frobenius norm of found - expected; infinite if any of found is not a number.

    Where only zeros are expected, as of one token sent to expert 0, it is 0 or infinite.
    """
    if np.array_equal(found, expected):
        return 0.0
    size = float(np.linalg.norm(expected))
    value = float(np.linalg.norm(found.astype(np.float64) - expected)) / size if size else float("inf")
    return value if np.isfinite(value) else float("inf")


def near_ties(inputs: dict[str, np.ndarray], spec: RouterSpec, seed: int, draws: int = 8) -> np.ndarray:
    """Which tokens [T] choose otherwise when their logits change by NEAR_TIE: there, rounding decides."""
    random = np.random.RandomState(seed)
    index = route(inputs["logits"], spec, inputs.get("bias"))[0]
    unsteady = np.zeros(len(index), bool)
    for _ in range(draws):
        noise = 1 + NEAR_TIE * random.standard_normal(inputs["logits"].shape)
        moved = (inputs["logits"] * noise).astype(np.float32)
        unsteady |= (route(moved, spec, inputs.get("bias"))[0] != index).any(axis=1)
    return unsteady
