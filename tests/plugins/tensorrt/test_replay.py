"""The whole chain without a GPU: op, draft, program, plugin, launches, kernels; against the numpy spec."""

from __future__ import annotations

import numpy as np
import pytest

from bench import paged_attention
from bench.plugin_harness import Io, PluginLibrary
from bench.variants import EXPERTS, MODELS, router_inputs
from moevlm.plugins.gpu.ops.base import KernelOp
from moevlm.plugins.gpu.ops.candidates import CandidatesOp
from moevlm.plugins.gpu.ops.cross_attention import CrossAttentionOp
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from moevlm.plugins.gpu.program import Program
from moevlm.plugins.ops.attention import cross_attention, segment_attention
from moevlm.plugins.ops.candidates import candidates
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import AttentionSpec, ExpertsSpec
from tests.plugins.gpu.interpreter import Interpreter
from tests.plugins.gpu.test_kernels_experts import TOLERANCES, draw_inputs, expected
from tests.plugins.gpu.test_kernels_paged_attention import SHARES, STEPS, with_shares
from tests.plugins.tensorrt.fake_cuda import FakeCuda
from tests.plugins.tensorrt.replay import execute, fake_program
from tests.support.gpu_attention import check

TOKENS = (1, 5, 33)
LARGEST = {"T": max(TOKENS)}
SMS = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
OPS = {
    "fp16": ExpertsOp(ExpertsSpec("swiglu_clamped"), 8, 3, hidden=40, inner=24, dtype="float16", has_biases=True),
    "fp32, input": ExpertsOp(ExpertsSpec("gelu_tanh", False, "input"), 5, 2, hidden=24, inner=40, dtype="float32"),
    "bf16, int4": ExpertsOp(ExpertsSpec(), 5, 2, 72, 40, "bfloat16", "int4", scales="float16", zeros=True),
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


def test_candidates_agree_with_the_spec(
    library: PluginLibrary, cuda: FakeCuda, triton_interpreter: Interpreter
) -> None:
    op = CandidatesOp(20001)
    logits = np.random.default_rng(0).standard_normal((3, op.vocabulary)).astype(np.float32)
    found = execute(library, cuda, triton_interpreter, op, {"logits": logits}, 90)
    values, ids, log_sum_exp = candidates(logits, op.columns)
    np.testing.assert_array_equal(found["ids"], ids)
    np.testing.assert_array_equal(found["values"], values)
    np.testing.assert_allclose(found["log_sum_exp"], log_sum_exp, rtol=1e-6)


def test_segment_attention_agrees_with_the_spec(
    library: PluginLibrary, cuda: FakeCuda, triton_interpreter: Interpreter
) -> None:
    op = SegmentAttentionOp(2, 20, "float32")
    random = np.random.default_rng(0)
    starts = np.array([0, 33, 34, 34, 57], np.int32)
    qkv = random.standard_normal((57, 3 * 40)).astype(np.float32)
    angles = random.uniform(0, 6, (57, 10))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    inputs = {"qkv": qkv, "cos": cos, "sin": sin, "image_start": starts}
    y = execute(library, cuda, triton_interpreter, op, inputs, 80, {"T": 100, "N": 9})["y"]
    want = segment_attention(*np.split(qkv, 3, 1), cos, sin, starts, op.heads)
    assert np.linalg.norm(y - want) <= 1e-5 * np.linalg.norm(want)


def test_cross_attention_agrees_with_the_spec(
    library: PluginLibrary, cuda: FakeCuda, triton_interpreter: Interpreter
) -> None:
    op, random = CrossAttentionOp(19, 2, 20, "float32"), np.random.default_rng(0)
    starts = np.array([0, 33, 34, 57], np.int32)
    q, kv = (random.standard_normal(shape).astype(np.float32) for shape in ((19, 40), (57, 80)))
    inputs = {"q": q, "kv": kv, "image_start": starts}
    y = execute(library, cuda, triton_interpreter, op, inputs, 80, {"T": 100, "N": 9})["y"]
    want = cross_attention(q, *np.split(kv, 2, 1), starts, op.heads)
    assert np.linalg.norm(y - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("cache", ["", "int8"])
@pytest.mark.parametrize("step", ["decode", "mixture"])
def test_paged_attention_agrees_with_the_spec(
    library: PluginLibrary, cuda: FakeCuda, triton_interpreter: Interpreter, step: str, cache: str
) -> None:
    op = PagedAttentionOp(AttentionSpec(4, 2, 64), 64, 64, "float32", cache, page_size=32, has_norms=True)
    inputs = paged_attention.draw_inputs(op, STEPS[step], seed=0)
    largest = {"T": 100, "N": 20, "M": 30, "P": 500}
    draft = with_shares(op, 80, SHARES)
    found = execute(library, cuda, triton_interpreter, op, inputs, 80, largest, draft)
    check(op, inputs, [found[name] for name in ("y", "key_cache", "value_cache")])


STEP = {"T": 4096, "N": 64, "M": 2048, "P": 100_000}
MLA = AttentionSpec(128, 1, rotary_dim=64, rotary_start=512, value_in_key=True, value_dim=512)
LAYERS: dict[str, KernelOp] = {
    "Qwen3-VL-30B-A3B": ExpertsOp(ExpertsSpec(), 128, 8, 2048, 768, "float16"),
    "Gemma-4-26B-A4B": ExpertsOp(ExpertsSpec("gelu_tanh"), 128, 8, 2816, 704, "float16", "int8"),
    "DeepSeek-V3": ExpertsOp(ExpertsSpec(), 256, 8, 7168, 2048, "float16", "int4"),
    "router": RouterOp(MODELS["deepseek_v3"], EXPERTS, True),
    "vision": SegmentAttentionOp(16, 72, "float16"),
    "resampler": CrossAttentionOp(256, 16, 72, "float16"),
    "candidates": CandidatesOp(151936),
    "attention": PagedAttentionOp(AttentionSpec(32, 4, rotary_dim=128), 128, 128, "float16", has_norms=True),
    "MLA": PagedAttentionOp(MLA, 576, 512, "float16", "int8"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_drafts_of_large_models_are_programs_for_every_gpu(library: PluginLibrary, name: str) -> None:
    op = LAYERS[name]
    images = [fake_program(op.draft(sm)).images[0] for sm in SMS]
    program = Program(op.name, op.inputs, op.outputs, tuple(images))
    plugin = library.plugin(op.name, program.to_bytes())
    io = Io.of(op.inputs, op.outputs, dict.fromkeys(STEP, 1), STEP)
    plugin.configure(io)
    assert plugin.workspace(io) >= max(image.variant(STEP).workspace(STEP) for image in images)
    plugin.close()
