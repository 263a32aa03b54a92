"""The whole chain without a GPU: op, draft, program, plugin, launches, kernels; against the numpy spec."""

from __future__ import annotations

import numpy as np
import pytest

from bench.plugin_harness import Io, PluginLibrary
from bench.variants import EXPERTS, MODELS, router_inputs
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.candidates import CandidatesOp
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from moevlm.plugins.gpu.program import Program
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import AttentionSpec, ExpertsSpec
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.test_kernels_experts import TOLERANCES, draw_inputs, expected
from tests.plugins.tensorrt.fake_cuda import FakeCuda
from tests.plugins.tensorrt.replay import execute, fake_program

TOKENS = (1, 5, 33)
LARGEST = {"T": max(TOKENS)}
SMS = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
OPS = {
    "fp16": ExpertsOp(ExpertsSpec("swiglu_clamped"), 8, 3, hidden=40, inner=24, dtype="float16", has_biases=True),
    "fp32, input": ExpertsOp(ExpertsSpec("gelu_tanh", False, "input"), 5, 2, hidden=24, inner=40, dtype="float32"),
    "bf16, int4": ExpertsOp(ExpertsSpec(), 5, 2, hidden=72, inner=40, dtype="bfloat16", weights="int4"),
    "fp16, fp8": ExpertsOp(ExpertsSpec(), 4, 4, hidden=40, inner=136, dtype="float16", weights="fp8", group_size=128),
}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", OPS)
def test_experts_agree_with_the_spec(
    library: PluginLibrary, cuda: FakeCuda, triton_interpreter: Interpreter, name: str, tokens: int
) -> None:
    op = OPS[name]
    inputs = draw_inputs(op, tokens, np.random.randint(1 << 30))
    y = execute(library, cuda, triton_interpreter, op, inputs, 86, LARGEST)["y"]
    want = expected(op, inputs)
    assert np.linalg.norm(y - want) <= TOLERANCES[op.dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("model", "has_bias"), [("deepseek_v3", True), ("gpt_oss", False), ("qwen3_vl_moe", False)])
def test_router_agrees_with_the_spec(
    library: PluginLibrary, cuda: FakeCuda, triton_interpreter: Interpreter, model: str, has_bias: bool, tokens: int
) -> None:
    op = RouterOp(MODELS[model], EXPERTS, has_bias)
    inputs = router_inputs(tokens, has_bias, seed=np.random.randint(1 << 30))
    found = execute(library, cuda, triton_interpreter, op, inputs, 90, LARGEST)
    expected_index, expected_weight = route(spec=op.spec, **inputs)
    np.testing.assert_array_equal(found["expert_index"], expected_index)
    np.testing.assert_allclose(found["expert_weight"], expected_weight, rtol=2e-6, atol=1e-7)


MLA = AttentionSpec(128, 1, rotary_dim=64, rotary_start=512, value_in_key=True, value_dim=512)
MODELS_LAYERS: dict[str, KernelOp] = {
    "Qwen3-VL-30B-A3B": ExpertsOp(ExpertsSpec(), 128, 8, 2048, 768, "float16"),
    "Gemma-4-26B-A4B": ExpertsOp(ExpertsSpec("gelu_tanh"), 128, 8, 2816, 704, "float16", "int8"),
    "DeepSeek-V3": ExpertsOp(ExpertsSpec(), 256, 8, 7168, 2048, "float16", "int4"),
    "Qwen3-VL's attention": PagedAttentionOp(AttentionSpec(32, 4, rotary_dim=128), 128, 128, "float16", has_norms=True),
    "DeepSeek-V3's attention": PagedAttentionOp(MLA, 576, 512, "float16", "int8"),
    "Qwen3-VL's vision": SegmentAttentionOp(16, 72, "float16"),
    "Qwen3-VL's vocabulary": CandidatesOp(151_936),
}


@pytest.mark.parametrize("name", MODELS_LAYERS)
def test_drafts_of_large_models_are_programs_for_every_gpu(library: PluginLibrary, name: str) -> None:
    op = MODELS_LAYERS[name]
    images = [fake_program(op.draft(sm)).images[0] for sm in SMS]
    program = Program(op.name, op.inputs, op.outputs, tuple(images))
    plugin = library.plugin(op.name, program.to_bytes())
    sizes = {"T": 4096, "N": 64, "M": 4096, "P": 1 << 16}
    io = Io.of(op.inputs, op.outputs, dict.fromkeys(sizes, 1), sizes)
    plugin.configure(io)
    assert plugin.workspace(io) >= max(image.variant(sizes).workspace(sizes) for image in images)
    plugin.close()
