"""Routers."""

from dataclasses import dataclass

import numpy as np
import torch

from bench import variants
from bench.gpu.cases.base import Arrays, Case, Cases, deviation
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import RouterSpec

NEAR_TIE = 1e-5  # logits are as good as equal if so small a relative change makes the spec choose otherwise


class RouterCases(Cases):
    """A call is its number of tokens."""

    kind, step = RouterOp, 32
    sizes = (1, 7, 300)

    def every_op(self) -> list[RouterOp]:
        """Every combination of attributes; each model's router with other numbers of experts, biases and factors."""
        ops = [RouterOp(spec, variants.EXPERTS, has_bias) for spec in variants.ROUTERS.values() for has_bias in (0, 1)]
        ops += [RouterOp(spec, experts, True) for spec in variants.MODELS.values() for experts in (60, 256)]
        return [*ops, *(RouterOp(spec, 60, False, True) for spec in variants.MODELS.values())]

    def describe(self, op: RouterOp) -> str:
        spec = op.spec
        groups = f" {spec.topk_group}/{spec.n_group} groups by {spec.group_score}" if spec.n_group > 1 else ""
        norm = f" renormalized +{spec.epsilon:g}" if spec.renormalize else ""
        bias, factors = (" bias" if op.has_bias else ""), (" factors" if op.has_scale else "")
        return f"router E{op.experts} k{spec.top_k} {spec.scoring}{norm} x{spec.scale:g}{groups}{bias}{factors}"

    def case(self, op: RouterOp, call: int, seed: int) -> Case:
        inputs = variants.router_inputs(call, op.has_bias, op.experts, seed, op.has_scale)
        expected = route(spec=op.spec, **inputs)
        held = _Held(*expected, ~near_ties(inputs, op.spec, seed))
        return Case([torch.from_numpy(inputs[tensor.name]) for tensor in op.inputs], held.deviation)


@dataclass(frozen=True)
class _Held:
    """index, weight: by the spec. steady: tokens whose choice no rounding changes."""

    index: np.ndarray
    weight: np.ndarray
    steady: np.ndarray

    def deviation(self, found: Arrays) -> float:
        """Of the weights of tokens that choose alike."""
        index, weight = found
        other = (index != self.index).any(axis=1)
        if (other & self.steady).any():
            token = int(np.flatnonzero(other & self.steady)[0])
            chosen = f"{index[token].astype(int).tolist()} (the spec: {self.index[token].tolist()})"
            raise ValueError(f"token {token} of {len(index)} chooses {chosen}")
        return deviation(weight[~other], self.weight[~other]) if (~other).any() else 0.0


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
