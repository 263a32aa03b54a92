"""Experts."""

from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch

from bench import variants
from bench.gpu.cases.base import Case, Cases, worst
from bench.gpu.cases.stored_weights import meant_weight, stored_weight
from moevlm.export.formats.base import rounded
from moevlm.export.formats.float8 import Float8Format
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import ACTIVATION_DTYPES, GROUP_SIZES, NVFP4_GROUP, ExpertsOp
from moevlm.plugins.gpu.program import Launch, chosen
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import RouterSpec
from moevlm.runtime.core.dtypes import E4M3

# experts, k, hidden, inner: round, with short last groups, and odd.
SIZES = ((16, 4, 256, 128), (8, 2, 136, 72), (24, 3, 101, 51))
# format, group size, dtype of scales, whether groups have zeros
STORED = (
    ("", GROUP_SIZES[""][0], "", False),
    *(
        (weights, size, E4M3 if size == NVFP4_GROUP else "", False)
        for weights, sizes in GROUP_SIZES.items()
        if weights
        for size in sizes
    ),
    *(("int4", size, scales, True) for size, scales in zip(GROUP_SIZES["int4"], ("", "float16"), strict=True)),
    ("fp8", 128, "float32", False),
)
BEYOND = 40  # tokens past a variant's limit, for the last one, which has none
SKEWED_FROM = 9  # tokens that are all sent to the same experts, too


@dataclass(frozen=True)
class ExpertsCall:
    """skewed: every token goes to the same experts. quantized: the kernels multiply activations in e4m3."""

    tokens: int
    skewed: bool = False
    quantized: bool = False

    def __str__(self) -> str:
        return f"{self.tokens} tokens{', skewed' if self.skewed else ''}{', in e4m3' if self.quantized else ''}"


class ExpertsCases(Cases):
    """See `Cases`."""

    kind, step = ExpertsOp, 3

    def every_op(self) -> list[ExpertsOp]:
        """Every dtype with every format of weights, and every combination of the experts' attributes."""
        blocks = [(spec, has_biases) for spec in variants.BLOCKS.values() for has_biases in (False, True)]
        stored = [(dtype, *format_) for dtype in ACTIVATION_DTYPES for format_ in STORED]
        count = 2 * max(len(blocks), len(stored))  # twice: each meets others the second time, as their numbers differ
        return [
            ExpertsOp(spec, *sizes, dtype, weights, group_size, has_biases, scales, zeros)
            for (spec, has_biases), (dtype, weights, group_size, scales, zeros), sizes in islice(
                zip(cycle(blocks), cycle(stored), cycle(SIZES), strict=False), count
            )
        ]

    def describe(self, op: ExpertsOp) -> str:
        weights = f" {op.weights}/{op.group_size}" if op.weights else ""
        weights += f" {op.scales} scales" * bool(op.scales) + " zeros" * op.zeros
        kind = f"{op.spec.activation}{' gated' if op.spec.gated else ''} on {op.spec.weight_on}"
        biases = " biases" if op.has_biases else ""
        return f"experts E{op.experts} k{op.top_k} H{op.hidden} I{op.inner} {op.dtype}{weights} {kind}{biases}"

    def calls(self, draft: Draft) -> list[ExpertsCall]:
        """The last variant has tokens beyond the others' limits."""
        limits = [variant.max_tokens for variant in draft.variants][:-1]
        counts = sorted({1, 5, *limits, *(limit + 1 for limit in limits), max([0, *limits]) + BEYOND})
        return [
            ExpertsCall(n, skewed, _quantizes(draft, n))
            for n in counts
            for skewed in ((False, True) if n >= SKEWED_FROM else (False,))
        ]

    def case(self, op: ExpertsOp, call: ExpertsCall, seed: int) -> Case:
        logits = variants.router_inputs(call.tokens, False, op.experts, seed)["logits"]
        index, weight = route(logits, RouterSpec(op.top_k))
        if call.skewed:
            index = np.broadcast_to(index[:1], index.shape).copy()
        x = rounded(variants.hidden_states(call.tokens, op.hidden, seed + 1), op.dtype)
        drawn = variants.expert_weights(op.spec, op.has_biases, op.hidden, op.inner, op.experts, seed + 2)
        arrays: dict[str, np.ndarray] = {"x": x, "expert_index": index, "expert_weight": weight}
        meant: dict[str, np.ndarray] = {}
        for name, array in drawn.items():
            if op.weights and name in ("gate_up", "down"):
                stored = stored_weight(op, name, array, seed)
                arrays |= stored
                meant[name] = meant_weight(op, name, stored, array.shape[-1])
            else:
                arrays[name] = meant[name] = rounded(array, op.dtype)
        held = partial(in_e4m3, group=op.group_size) if call.quantized else np.asarray
        y = reference_experts(held(x.astype(np.float64)), index, weight, spec=op.spec, between=held, **meant)
        inputs = [torch.from_numpy(arrays[t.name]).to(getattr(torch, t.dtype)) for t in op.inputs]
        return Case(inputs, lambda found: worst(found, [y]))


def _quantizes(draft: Draft, tokens: int) -> bool:
    """Whether activations are quantized for so many tokens."""
    steps = (step for step in chosen(draft.variants, {"T": tokens}).steps if isinstance(step, Launch))
    return any(draft.kernels[step.kernel].function == "quantize_rows" for step in steps)


def in_e4m3(rows: np.ndarray, group: int) -> np.ndarray:
    """rows [R, K] as e4m3 with a scale for each group of columns holds them, float64."""
    form = Float8Format(group)
    return form.decode(*form.encode(rows))[:, : rows.shape[1]].astype(np.float64)
