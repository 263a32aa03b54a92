"""The experts kernels, interpreted, against the numpy spec on the weights as they are stored."""

import numpy as np
import pytest

from moevlm.plugins import reference
from moevlm.plugins.gpu import packing
from moevlm.plugins.gpu.ops import ACTIVATION_DTYPES, ExpertsOp
from moevlm.plugins.gpu.planning import plan
from moevlm.plugins.spec import ExpertsSpec
from moevlm.plugins.variants import BLOCKS, expert_weights, hidden_states
from tests.plugins.gpu.interpreter import Interpreter

# Relative Frobenius norm. Interpreted bfloat16 is cut off, not rounded.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
FORMATS = [("", 32), ("int8", 32), ("int8", 128), ("int4", 32), ("int4", 128), ("fp8", 32), ("fp8", 128)]
SILU = ExpertsSpec()


def draw_inputs(op: ExpertsOp, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """All inputs of `op` as float32 that its dtypes hold exactly, and the weights as they are stored."""
    rng = np.random.default_rng(seed)
    weights = expert_weights(op.spec, op.has_biases, op.hidden, op.inner, op.experts, seed)
    weights["down"] *= op.inner**-0.5
    inputs = {
        "x": packing.rounded(hidden_states(tokens, op.hidden, seed), op.dtype),
        "expert_index": np.argsort(rng.random((tokens, op.experts)), 1)[:, : op.top_k].astype(np.int32),
        "expert_weight": rng.random((tokens, op.top_k), np.float32),
    }
    for name, values in weights.items():
        if op.weights and values.ndim == 3:
            rows = values.reshape(-1, values.shape[-1])
            stored, scales = packing.quantize(rows, op.weights, op.block, op.dtype)
            inputs[name] = stored.reshape(*values.shape[:2], -1)
            inputs[f"{name}_scale"] = scales.reshape(*values.shape[:2], -1)
        else:
            inputs[name] = packing.rounded(values, op.dtype)
    return inputs


def expected(op: ExpertsOp, inputs: dict[str, np.ndarray]) -> np.ndarray:
    weights = {}
    for name, width in (("gate_up", op.hidden), ("down", op.inner)):
        weights[name] = inputs[name]
        if op.weights:
            weights[name] = packing.unpack(inputs[name], inputs[f"{name}_scale"], op.weights, op.block, width)
        if op.has_biases:
            weights[f"{name}_bias"] = inputs[f"{name}_bias"]
    weights = {name: values.astype(np.float64) for name, values in weights.items()}
    routing = inputs["expert_index"], inputs["expert_weight"]
    return reference.experts(inputs["x"].astype(np.float64), *routing, spec=op.spec, **weights)


def agrees(interpreter: Interpreter, op: ExpertsOp, tokens: int, sm: int = 80, seed: int | None = None) -> None:
    inputs = draw_inputs(op, tokens, np.random.randint(1 << 30) if seed is None else seed)
    (y,) = interpreter.run(plan(op, sm), inputs)
    want = expected(op, inputs)
    assert np.linalg.norm(y - want) <= TOLERANCES[op.dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("has_biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_variant_agrees_with_the_spec(
    triton_interpreter: Interpreter, name: str, has_biases: bool, tokens: int
) -> None:
    op = ExpertsOp(BLOCKS[name], 8, 3, hidden=40, inner=24, dtype="float32", has_biases=has_biases)
    agrees(triton_interpreter, op, tokens)


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
@pytest.mark.parametrize(("weights", "block"), FORMATS)
def test_every_format_of_weights_agrees_with_the_spec(
    triton_interpreter: Interpreter, weights: str, block: int, dtype: str, tokens: int
) -> None:
    op = ExpertsOp(SILU, 5, 2, hidden=136, inner=72, dtype=dtype, weights=weights, block=block, has_biases=True)
    agrees(triton_interpreter, op, tokens)


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 33, 70])
def test_a_few_tokens_and_many(triton_interpreter: Interpreter, tokens: int) -> None:
    op = ExpertsOp(SILU, 6, 3, hidden=48, inner=16, dtype="float16")
    agrees(triton_interpreter, op, tokens)
