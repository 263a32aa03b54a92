"""What the numpy spec answers for seeded inputs, as data in git. Run as a script, this rewrites moe.json.

A change of moe.json is a change of what the MoE ops mean, for every kernel, graph and engine: say why in the commit.
"""

import json
from pathlib import Path

import numpy as np

from bench import variants
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.router import route

FILE = Path(__file__).parent / "moe.json"
TOKENS = 3
SEED = 20
ROUTER_INPUTS = {"no_bias": (False, False), "bias": (True, False), "expert_scale": (False, True)}


def goldens() -> dict[str, dict]:
    """Router: variant -> index and weight, of each set of inputs. Experts: variant -> y, without and with biases."""
    routers = {
        name: {key: _route(spec, *given) for key, given in ROUTER_INPUTS.items()}
        for name, spec in (variants.ROUTERS | variants.MODELS).items()
    }
    experts = {
        name: {key: _experts(spec, biases) for key, biases in (("no_bias", False), ("bias", True))}
        for name, spec in variants.BLOCKS.items()
    }
    return {"router": routers, "experts": experts}


def _route(spec: variants.RouterSpec, has_bias: bool, has_scale: bool) -> dict[str, list]:
    index, weight = route(spec=spec, **variants.router_inputs(TOKENS, has_bias, seed=SEED, has_scale=has_scale))
    return {"index": index.tolist(), "weight": _short(weight)}


def _experts(spec: variants.ExpertsSpec, has_biases: bool) -> list:
    index, weight = route(variants.router_inputs(TOKENS, False, seed=SEED)["logits"], variants.MODELS["gpt_oss"])
    weights = variants.expert_weights(spec, has_biases, hidden=4, inner=3, seed=SEED)
    x = variants.hidden_states(TOKENS, hidden=4, seed=SEED)
    return _short(reference_experts(x, index, weight, spec=spec, **weights))


def _short(array: np.ndarray) -> list:
    """Nested lists with 7 digits: what a float32 holds."""
    return [[float(f"{value:.7g}") for value in row] for row in array.tolist()]


if __name__ == "__main__":
    groups = [
        f'"{op}": {{\n' + ",\n".join(f'"{name}": {json.dumps(case)}' for name, case in cases.items()) + "\n}"
        for op, cases in goldens().items()
    ]
    FILE.write_text("{\n" + ",\n".join(groups) + "\n}\n")
