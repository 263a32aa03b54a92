"""The check on a GPU, as far as it runs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moevlm.runtime
from bench import gpu_check, variants
from bench.gpu import attention, checks, cubins, engine, facts, grouped_mm, layers, part, plugin, report, shapes, tune
from bench.gpu.cases import CASES, all_ops, cases_of, some_ops
from bench.gpu.cases.base import Cases, deviation
from bench.gpu.cases.experts import ExpertsCall, ExpertsCases
from bench.gpu.cases.router import RouterCases, near_ties
from bench.gpu.driver import POISON, CubinRunner
from moevlm.export.build import build
from moevlm.plugins.gpu import tiles
from moevlm.plugins.gpu.draft import Draft
from moevlm.plugins.gpu.ops.experts import GROUP_SIZES, ExpertsOp
from moevlm.plugins.gpu.ops.projection import FORMATS
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.program import TOKENS, Argument, Fill, Image, Kernel, Launch, Program, Variant, chosen
from moevlm.plugins.gpu.sizes import ONE, T, Tensor, at_most, fixed, per_token, sizes_of
from moevlm.plugins.ops.experts import experts as reference_experts
from moevlm.plugins.ops.router import route
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from tests.plugins.tensorrt.fake_cuda import FakeCuda, compile_driver, image
from tests.plugins.tensorrt.programs import expected_calls, mapped_program, sizes_at

ROOT = Path(__file__).parents[2]
QWEN, GEMMA, DEEPSEEK = shapes.LAYERS


def python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = python("-m", "bench.gpu_check")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"error: no CUDA GPU that torch {torch.__version__} can use"]


ONLY = """
import sys
absent = {"click", "rich", "msgspec", "PIL", "jinja2", "tokenizers", "onnx", "onnx_ir", "ml_dtypes", "safetensors"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import bench.gpu_check, bench.gpu.tune
for name in ("part", "facts", *bench.gpu_check.PARTS):
    __import__(f"bench.gpu.{name}")
print("all")
"""


def test_it_needs_nothing_but_torch_triton_and_numpy() -> None:
    done = python("-c", ONLY)
    assert done.stdout == "all\n", done.stderr


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.arguments(["--only", "everything"])
    assert "argument --only: invalid choice: 'everything'" in capsys.readouterr().err
    assert gpu_check.arguments(["--only", "layers", "--only", "checks"]).only == ["layers", "checks"]
    assert gpu_check.arguments([]).only is None


# Layers


def test_layers_are_those_of_the_models() -> None:
    sizes = [(layer.hidden, layer.inner, layer.experts, layer.router.top_k) for layer in shapes.LAYERS]
    assert sizes == [(2048, 768, 128, 8), (2816, 704, 128, 8), (7168, 2048, 256, 8)]
    assert [layer.activation for layer in shapes.LAYERS] == ["silu", "gelu_tanh", "silu"]
    assert (DEEPSEEK.router.n_group, DEEPSEEK.router.topk_group, DEEPSEEK.has_bias) == (8, 4, True)
    assert (shapes.TOKEN_COUNTS[0], shapes.TOKEN_COUNTS[-1], len(shapes.TOKEN_COUNTS)) == (1, 4096, 13)


def test_bytes_are_those_of_the_active_experts_weights_and_scales() -> None:
    numbers = 3 * 2048 * 768
    assert shapes.weight_bytes(QWEN.experts_op(), 8) == 8 * 2 * numbers
    assert shapes.weight_bytes(QWEN.experts_op(weights="int8"), 8) == 8 * (numbers + 2 * numbers // 32)
    assert shapes.weight_bytes(QWEN.experts_op(weights="int4", group_size=128), 5) == 5 * (
        numbers // 2 + 2 * numbers // 128
    )
    assert shapes.weight_bytes(DEEPSEEK.experts_op(), 256) == pytest.approx(22.5e9, rel=0.01)


def test_operations_are_two_for_each_weight_of_each_routed_row() -> None:
    assert shapes.operations(QWEN.experts_op(), 4096) == 2 * 4096 * 8 * 3 * 2048 * 768
    plain = replace(QWEN.experts_op(), spec=ExpertsSpec(gated=False))
    assert shapes.operations(plain, 1) == 2 * 8 * 2 * 2048 * 768


def test_fractions_of_the_limits() -> None:
    limits = shapes.Limits(bandwidth=4e12, peak=8e14)
    assert limits.of_bandwidth(3e9, 1e-3) == pytest.approx(0.75)
    assert limits.of_peak(4e11, 1e-3) == pytest.approx(0.5)


@pytest.mark.parametrize("layer", shapes.LAYERS, ids=lambda layer: layer.name)
def test_the_peer_computes_what_the_spec_says(layer: shapes.Layer) -> None:
    small = replace(layer, hidden=48, inner=32)
    generator = torch.Generator().manual_seed(0)  # sigmoids of torch and numpy differ in the last bit
    logits = torch.randn(33, small.experts, generator=generator)
    bias = 0.1 * torch.randn(small.experts, generator=generator) if small.has_bias else None
    scale = torch.rand(small.experts, generator=generator) if small.has_scale else None
    index, weight = grouped_mm.route(logits, small.router, bias, scale)
    expected = route(logits.numpy(), small.router, *(None if t is None else t.numpy() for t in (bias, scale)))
    assert (index.numpy() == expected[0]).all()
    np.testing.assert_allclose(weight, expected[1], rtol=1e-5)
    x = torch.randn(33, 48, generator=generator)
    gate_up = torch.randn(small.experts, 64, 48, generator=generator) / 7
    down = torch.randn(small.experts, 48, 32, generator=generator) / 6
    y = grouped_mm.experts(x, index, weight, gate_up, down, small.activation)
    arrays = [tensor.numpy().astype(np.float64) for tensor in (x, index.int(), weight, gate_up, down)]
    arrays[1] = index.numpy()
    assert deviation(y.numpy(), reference_experts(*arrays, small.experts_op().spec)) < 1e-5


def test_weights_taking_turns_exceed_any_cache() -> None:
    cache = 126 << 20  # a B200's
    for layer in shapes.LAYERS:
        for weights in FORMATS:
            op = layer.experts_op(weights=weights)
            sets = min(layers.MOST_SETS, layers.SETS_BYTES // shapes.weight_bytes(op, op.experts))
            # What is read before the same set is read again, and with it perhaps the same expert.
            assert max(sets, 1) * shapes.weight_bytes(op, op.top_k) > cache
    assert [layers.routings(tokens) for tokens in (1, 64, 65, 4096)] == [16, 16, 4, 2]
    assert {weights for weights, _ in layers.STORED} == set(FORMATS)
    assert set(layers.PREFILL_TOKENS) < set(shapes.TOKEN_COUNTS)


# Cases


@pytest.mark.parametrize("sm", [75, 90])
def test_ops_between_them_have_every_format_dtype_and_attribute(sm: int) -> None:
    ops = ExpertsCases().ops(sm)
    formats = {(op.weights, op.group_size) for op in ops if op.weights}
    assert formats == {(weights, size) for weights in FORMATS if weights for size in GROUP_SIZES[weights]}
    assert ("fp4", 16) in formats
    dtypes = {"float16", "float32"} | ({"bfloat16"} if sm >= 80 else set())
    assert {(op.dtype, op.weights) for op in ops} == {(d, w) for d in dtypes for w in FORMATS}
    assert {(op.spec, op.has_biases) for op in ops} == {(s, b) for s in variants.BLOCKS.values() for b in (False, True)}
    routers = RouterCases().ops(sm)
    assert {op.spec for op in routers} == {*variants.ROUTERS.values(), *variants.MODELS.values()}
    descriptions = [cases_of(op).describe(op) for op in all_ops(sm)]
    assert len(set(descriptions)) == len(descriptions)
    kinds = [cases.kind for cases in CASES]
    assert {type(op) for op in some_ops(sm)} == {*kinds}
    assert len(all_ops(sm)) == sum(len(cases.ops(sm)) for cases in CASES)
    half = all_ops(sm)[: len(all_ops(sm)) // 2]  # where time runs out
    for cases in CASES:
        assert abs(sum(isinstance(op, cases.kind) for op in half) - len(cases.ops(sm)) / 2) <= 1


def reachable(draft: Draft) -> set[int]:
    """Variants that some sizes choose, found around every bound."""
    near = {1, 2, 3, 1000}
    for bound in (bound for variant in draft.variants for bound in variant.bounds if len(bound.slopes) == 1):
        limit = -bound.offset // sum(bound.slopes.values())
        near |= {limit - 1, limit, limit + 1}
    tokens = sorted(n for n in near if 0 < n < 1 << 15)  # beyond are what grids can hold
    sizes = [{"T": t, "N": n, "M": 20, "P": 1000} for t in tokens for n in (*tokens, t - 1, t) if n > 0]
    return {draft.variants.index(chosen(draft.variants, each)) for each in sizes}


@pytest.mark.parametrize("cases", CASES, ids=lambda cases: cases.kind.__name__)
def test_calls_use_every_variant_of_a_draft_and_have_the_shapes_that_the_op_states(cases: Cases) -> None:
    for op in cases.ops(90)[2:3]:
        draft = op.draft(90)
        calls = cases.calls(draft)
        drawn, other = [cases.case(op, call, seed=3) for call in calls], cases.case(op, calls[0], seed=4)
        for case in (*drawn, other):
            assert [str(tensor.dtype)[6:] for tensor in case.inputs] == [tensor.dtype for tensor in op.inputs]
        shapes_ = [[tuple(tensor.shape) for tensor in case.inputs] for case in (*drawn, other)]
        assert shapes_[-1] == shapes_[0]
        assert not all(torch.equal(a, b) for a, b in zip(drawn[0].inputs, other.inputs, strict=True))
        sizes = [sizes_of(op.inputs, each) for each in shapes_]
        used = {draft.variants.index(chosen(draft.variants, each)) for each in sizes}
        assert used == reachable(draft), cases.describe(op)
        least, most = plugin.range_of(Program(op.name, op.inputs, op.outputs, ()), drawn)
        for name in least:
            assert (least[name], most[name]) == (min(each[name] for each in sizes), max(each[name] for each in sizes))


def test_skewed_tokens_share_their_experts() -> None:
    op = ExpertsOp(ExpertsSpec(), 6, 2, 40, 24, "bfloat16", "int4", 32, has_biases=True)
    case = ExpertsCases().case(op, ExpertsCall(7, skewed=True), seed=3)
    assert len(case.inputs[1].unique()) == 2
    assert case.deviation([np.full((7, 40), np.nan)]) == float("inf")


def test_near_ties_are_told_from_clear_choices() -> None:
    spec = RouterSpec(top_k=1)
    logits = np.array([[2.0, 1.0, 0.0], [2.0, 2.0 - 1e-7, 0.0], [0.0, 0.3, 0.3]], np.float32)
    assert near_ties({"logits": logits}, spec, seed=0, draws=64).tolist() == [False, True, True]


CHECKER = """
import json
from bench.gpu import checks, launch
from bench.gpu.cases import cases_of
from bench.gpu.cases.experts import ExpertsCall
from bench.gpu.cases.gated_delta import LengthsCall
from bench.gpu.cases.paged_attention import SequencesCall
from moevlm.plugins.gpu.ops.candidates import CandidatesOp
from moevlm.plugins.gpu.ops.cross_attention import CrossAttentionOp
from moevlm.plugins.gpu.ops.experts import GROUP_SIZES, ExpertsOp
from moevlm.plugins.gpu.ops.gated_delta import GatedDeltaOp
from moevlm.plugins.gpu.ops.paged_attention import PagedAttentionOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.ops.segment_attention import SegmentAttentionOp
from moevlm.plugins.ops.spec import AttentionSpec, ExpertsSpec, GatedDeltaSpec, RouterSpec
calls = {
    ExpertsOp(ExpertsSpec(), 4, 2, 32, 24, "float16", "int8", 32): [
        ExpertsCall(1), ExpertsCall(3), ExpertsCall(9), ExpertsCall(9, True)
    ],
    RouterOp(RouterSpec(top_k=2), 6): [1, 5],
    SegmentAttentionOp(1, 20, "float16"): [(4,), (9, 0, 7)],
    CrossAttentionOp(3, 1, 20, "float16"): [(4,), (9, 1, 7)],
    PagedAttentionOp(AttentionSpec(2, 1, 16), 16, 16, "float16", "int8", has_norms=True): [
        SequencesCall(((70, 1),)), SequencesCall(((3, 5), (0, 1)))
    ],
    GatedDeltaOp(GatedDeltaSpec(1, 2, 16, 16, 4), "float16"): [LengthsCall((1, 1), 1), LengthsCall((3, 1))],
    CandidatesOp(300): [1, 3],
}
for op, some in calls.items():
    type(cases_of(op)).calls = lambda *_, some=some: some
found = {op.name: [checks.check(op, 90, "cpu")] for op in calls}
run = launch.run
def wrong(draft, inputs):
    outputs = run(draft, inputs)
    if draft.op == "MoERouter":
        outputs[0][-1] = (outputs[0][-1] + 1) % 6
    elif draft.op == "Candidates":
        outputs[1][-1, :2] = outputs[1][-1, :2].flip(0)
    else:
        outputs[0][-1, -1] = float("nan")
    return outputs
launch.run = wrong
for op in calls:
    found[op.name].append(checks.check(op, 90, "cpu"))
launch.run = None
print(json.dumps([found, checks.check(RouterOp(RouterSpec(top_k=2), 6), 90, "cpu")]))
"""


def test_checker_passes_the_kernels_and_finds_wrong_ones() -> None:
    done = python("-c", CHECKER, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    found, broken = json.loads(done.stdout)
    wrong = {
        "MoEExperts": "1 tokens: off by inf",
        "MoERouter": "token 0 of 1 chooses",
        "SegmentAttention": "(4,): off by inf",
        "CrossAttention": "(4,): off by inf",
        "PagedAttention": "1 sequences: 70+1: off by inf",
        "GatedDelta": "2 sequences: 1, 1: off by inf",
        "Candidates": "ids of row 0 at 0: ",
    }
    assert set(found) == set(wrong)
    for name, (right, other) in found.items():
        assert "error" not in right, right
        assert right["worst"] <= right["allowed"]
        assert wrong[name] in other["error"]
    assert found["MoEExperts"][0]["calls"] == ["1 tokens", "3 tokens", "9 tokens", "9 tokens, skewed"]
    assert broken["error"].startswith("TypeError")


def test_deviation_from_zeros_alone_is_none_or_infinite() -> None:
    zeros = np.zeros((1, 1), np.int32)  # the index of one token that goes to expert 0
    assert deviation(zeros, zeros) == 0
    assert deviation(zeros + 1, zeros) == float("inf")
    assert deviation(np.array([np.nan]), np.array([1.0])) == float("inf")
    assert deviation(np.array([3.0, 0.0]), np.array([3.0, 4.0])) == pytest.approx(0.8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_cannot_launch_the_checks_run_the_machine_code() -> None:
    why = facts.launcher_missing()
    assert "0 active drivers" in why
    assert list(cubins.run(90)) == [{"kind": "cubins", "skipped": why}]
    entry = checks.check(RouterOp(RouterSpec(top_k=2), 6), 90, "cuda")
    assert entry["error"].startswith("OSError: libcuda.so.1")  # compiled, and handed to the driver
    assert checks.check(RouterOp(RouterSpec(top_k=2), 6), 90, "cpu")["error"].startswith("RuntimeError")


def test_without_a_compiler_the_plugin_is_left_out_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    entries = list(plugin.run(90))
    assert entries == [{"kind": "plugin", "skipped": "no-such-compiler, which compiles it, is not installed"}]
    assert report.text_of(entries) == f"plugin: {entries[0]['skipped']}\n\nno failures"


# Attention

ATTENTION = """
import json
from bench.gpu import attention
from bench.gpu.attention import Point
from bench.gpu.attention_inputs import Model
from bench.gpu.shapes import Limits
from tests.support.interpreted_device import Interpreted
device, model, limits = Interpreted(75), Model("tiny", 4, 2, 32), Limits(1e9, 1e9)
attention.SPARE_BYTES, attention.SETS_BYTES = 0, 1
chunk = Point(model, "", 1, 64, 9, flex=True)
points = [Point(model, "", 2, 70), Point(model, "", 1, 0, 40), chunk, Point(model, "int8", 2, 70)]
found = []
def measure(point):
    op = point.model.op(device.dtype, point.cache)
    found.append(attention.measure(point, op, device.runner(op), device, limits))
for point in points:
    measure(point)
Interpreted.free = 1000
measure(points[0])
print(json.dumps(found))
"""


def test_attention_is_timed_against_the_limits_and_pytorch_s_best_and_computes_the_same() -> None:
    done = python("-c", ATTENTION, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    decode, prefill, chunk, quantized, large = json.loads(done.stdout)
    for entry in (decode, prefill, chunk):
        assert "error" not in entry, entry
        assert 0 < entry["difference"] < 1e-2
        assert entry["peer_seconds"] == 1e-3
    assert decode["bytes"] == 2 * 71 * 2 * (32 + 32) * 2
    assert decode["operations"] == 2 * 2 * 71 * 4 * (32 + 32)
    assert decode["of_bandwidth"] == pytest.approx(decode["bytes"] / 1e-3 / 1e9)
    assert prefill["operations"] == 2 * (40 * 41 // 2) * 4 * (32 + 32)
    assert set(chunk["peers_seconds"]) >= {"flex"}
    assert quantized["bytes"] == 2 * 71 * 2 * (36 + 36)
    assert not {"error", "peer", "skipped"} & set(quantized)
    assert large["skipped"].startswith("needs 0.0 GB of memory")
    text = report.text_of([decode, prefill, chunk, quantized, large])
    assert "attention of tiny, caches float16" in text
    assert "attention of tiny, 2 sequences with 70 tokens: needs" in text


def test_points_cover_decode_of_1_to_64_sequences_and_prefill_to_32k() -> None:
    decode = {(p.sequences, p.past) for p in attention.POINTS if p.tokens == 1 and not p.cache}
    assert decode >= {(n, past) for n in (1, 2, 4, 8, 16, 32, 64) for past in (512, 4096, 32768, 131072)}
    assert {p.tokens for p in attention.POINTS} == {1, 2048, 8192, 32768}
    assert {p.cache for p in attention.POINTS} == {"", "int8", "fp8"}
    assert len(set(attention.POINTS)) == len(attention.POINTS)


# Experts in the host's memory

HOST_EXPERTS = """
import ctypes, json
from dataclasses import replace
import torch
from bench.gpu import host_experts, layers
from bench.gpu.mapped import MappedMemory
from bench.gpu.shapes import LAYERS
from tests.support.interpreted_device import Interpreted

class Driver:
    def __init__(self):
        self.held = {}
    def cuMemHostAlloc(self, address, size, flags):
        assert flags.value == 3
        memory = ctypes.create_string_buffer(size.value)
        self.held[ctypes.addressof(memory)] = memory
        address._obj.value = ctypes.addressof(memory)
        return 0
    def cuMemHostGetDevicePointer_v2(self, seen, address, flags):
        seen._obj.value = address.value
        return 0
    def cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)
        return 0
    def cuMemFreeHost(self, address):
        return 0 if self.held.pop(address.value, None) else 1

driver, device = Driver(), Interpreted(90)
memory = MappedMemory(driver)
layers.routings = lambda tokens: 2
small = replace(LAYERS[0], hidden=64, inner=32, experts=8, router=replace(LAYERS[0].router, top_k=2))
link = host_experts.copied(device, memory, 1000)
found = list(host_experts.measure(small, "int4", (1, 3), device, memory, link))
held = len(driver.held)
memory.close()
print(json.dumps([link, found, held, len(driver.held)]))
"""


def test_experts_in_host_memory_are_timed_against_the_link_and_compute_the_same() -> None:
    done = python("-c", HOST_EXPERTS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    link, entries, held, left = json.loads(done.stdout)
    assert (link, held, left) == (pytest.approx(1e6), 1 + 4, 0)
    assert [entry["tokens"] for entry in entries] == [1, 3]
    expert = 3 * 64 * 32 // 2 + 2 * 3 * 64 * 32 // 32
    assert entries[0]["bytes"] == 2 * expert
    assert entries[0]["of_link"] == pytest.approx(2 * expert / 1e-3 / 1e6)
    assert all("error" not in entry for entry in entries)
    text = report.text_of([{"kind": "link", "bytes_per_second": 55e9}, *entries])
    assert "link: 55.0 GB/s from the host's memory" in text
    assert "Qwen3-VL-30B-A3B, weights int4 in the host's memory" in text


# Engines


def test_an_engine_s_answers_are_compared_alone_and_at_once(tmp_path: Path) -> None:
    """The demo's reference stands for the engine: what is measured is the same."""
    bundle = build(ROOT / "demo/checkpoint", tmp_path / "demo.moevlm", ["reference"])
    with moevlm.runtime.load(bundle.directory, "reference") as runtime:
        some = engine.questions()[:2]
        expected, seconds = engine.alone(runtime, some)
        assert engine.together(runtime, some)[0] == expected
        assert 0 < seconds < 60
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "questions", lambda: some)
            found = engine.compare(runtime, expected)
            assert (found["answers"], found["same"], found["same_together"]) == (2, 2, 2)
            wrong = engine.compare(runtime, [expected[0], "something else"])
    assert wrong["error"] == "only 1 of 2 answers are the same"
    entry = {"kind": "engine", "target": "rtx:sm89", **found}
    assert "engine rtx:sm89: 2 of 2 answers the same, 2 at once; " in report.text_of([entry])


# The driver


@pytest.fixture
def fake(tmp_path: Path) -> tuple[FakeCuda, Path]:
    path = compile_driver(tmp_path / "libcuda.so.1")
    return FakeCuda(path), path


def test_machine_code_is_launched_as_the_program_says(fake: tuple[FakeCuda, Path]) -> None:
    cuda, path = fake
    kernels = (
        Kernel("first", 4, 60_000, 5, image("first", ["*fp32", "*i32", "i32", "*i8", "*i8"])),
        Kernel("second", 2, 0, 3, image("second", ["*i32", "*fp32", "i32"])),
    )
    given = Argument("input", 1), Argument("workspace", 1), TOKENS, Argument("null"), Argument("null")
    others = Argument("workspace"), Argument("output"), Argument("constant", 5)
    steps = (
        Fill(1, 7, per_token(3)),
        Launch(0, (per_token(1, divisor=4), ONE, fixed(2)), given),
        Launch(1, (per_token(1, -9), ONE, ONE), others),
    )
    buffers = (per_token(100), per_token(12))
    named = (Tensor("a", "float32", (T,)), Tensor("b", "float32", (4,))), (Tensor("y", "bfloat16", (T, 2)),)
    program = Program("MoEExperts", *named, (Image(86, kernels, (Variant((at_most(4096),), buffers, steps),)),))
    runner = CubinRunner(program, 86, "cpu", str(path))
    inputs = [torch.zeros(9), torch.zeros(4)]
    prepared = runner.prepare(inputs)
    (y,) = prepared.outputs
    assert (y.dtype, y.shape) == (torch.bfloat16, (9, 2))
    assert (y.view(torch.uint8) == POISON).all()
    assert y.isnan().all()
    cuda.events()
    prepared()
    memset, launch = [event.values for event in cuda.events() if event.values]  # the second grid is empty
    workspace = prepared.kept[-1]
    first, second = workspace.data_ptr(), workspace.data_ptr() + 1024  # 900 bytes, rounded up
    assert len(workspace) == 1024 + 256
    assert (memset["address"], memset["value"], memset["words"]) == (second, 7, 27)
    assert (launch["entry"], launch["grid"], launch["block"], launch["shared"]) == (
        "first",
        [3, 1, 2],
        [128, 1, 1],
        60_000,
    )
    assert launch["arguments"] == [inputs[1].data_ptr(), second, 9, 0, 0]
    runner.run([torch.zeros(10), inputs[1]])
    last = [event.values for event in cuda.events() if event.values][-1]
    assert (last["entry"], last["grid"], last["arguments"][2]) == ("second", [1, 1, 1], 5)
    assert first != last["arguments"][0]
    with (
        cuda.failing("cuLaunchKernel", 719),
        pytest.raises(RuntimeError, match="launching first: error 719, unspecified"),
    ):
        prepared()
    runner.close()
    assert cuda.loaded() == 0


def test_launches_overlap_where_the_program_says_so(fake: tuple[FakeCuda, Path]) -> None:
    cuda, path = fake
    cuda.set_sm(90)
    kernels = (Kernel("first", 4, 64, 1, image("first", ["*fp32"])),)
    grid, given = (per_token(1), ONE, ONE), (Argument("output"),)
    steps = Launch(0, grid, given), Launch(0, grid, given, overlaps=True)
    variant = Variant((at_most(4096),), (), steps)
    y = Tensor("y", "float32", (T,))
    program = Program("MoEExperts", (Tensor("a", "float32", (T,)),), (y,), (Image(90, kernels, (variant,)),))
    runner = CubinRunner(program, 90, "cpu", str(path))
    prepared = runner.prepare([torch.zeros(3)])
    prepared()
    first, second = [event for event in cuda.events() if event.call.startswith("cuLaunch")]
    assert (first.call, second.call) == ("cuLaunchKernel", "cuLaunchKernelEx")
    assert first.values == second.values
    assert second.values["arguments"] == [prepared.outputs[0].data_ptr()]
    with cuda.failing("cuLaunchKernelEx", 719), pytest.raises(RuntimeError, match="launching first: error 719"):
        prepared()
    runner.close()


def test_machine_code_is_given_tensor_maps(fake: tuple[FakeCuda, Path]) -> None:
    cuda, path = fake
    cuda.set_sm(90)
    program = mapped_program()
    runner = CubinRunner(program, 90, "cpu", str(path))
    inputs = [torch.zeros(5, 64, dtype=torch.float16), torch.zeros(8, 32, 64, dtype=torch.bfloat16)]
    prepared = runner.prepare(inputs)
    prepared()
    addresses = [tensor.data_ptr() for tensor in (*inputs, *prepared.outputs, prepared.kept[-1])]
    expected = expected_calls(program, 90, sizes_at(5), addresses[:2], addresses[2:3], addresses[3])
    launches = [event.values["arguments"] for event in cuda.events() if event.call == "cuLaunchKernel"]
    assert launches == [values["arguments"] for _, values in expected]
    runner.close()


# Tuning


def test_tuning_picks_the_fastest_tile_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With invented times in the place of measured ones, the result is a table that plans can be made of."""

    def times(
        tuner: Any, _: Any, op: ExpertsOp, tokens: int, used: Any, projection: str, tried: list[tuple[int, ...]]
    ) -> dict[tuple[int, ...], float]:
        tried_tiles.update(tried)
        for tile in tried:
            used[projection] = list(tile)
            op.draft(tuner.sm, tokens)  # is accepted
        wanted = {"gate_up": 64, "down": 128}[projection]
        fits = [tile for tile in tried if tile[1] < 256]
        return {tile: 1.0 + abs(tile[1] - wanted) + abs(tile[2] - 64) + abs(tile[0] - tokens / 100) for tile in fits}

    monkeypatch.setattr(tune._Tuner, "_time", times)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 << 30, 80 << 30))
    tiles.table.cache_clear()
    tried_tiles: set[tuple[int, ...]] = set()
    entries_in_use = [tiles.table()["90"][bits][name] for bits in tune.BITS for name in ("single", "few")]
    in_use = [tuple(entry[projection]) for entry in entries_in_use for projection in ("gate_up", "down")]
    try:
        *entries, last = tune.run(90)
        tiles.table()["90"] = last["table"]
        drafts = [layer.experts_op(weights=w).draft(90) for layer in shapes.LAYERS for w in ("", "int8", "int4")]
    finally:
        tiles.table.cache_clear()
    assert all(len(one.variants) >= 4 for one in drafts)
    assert {"32", "16", "8", "4"} <= set(last["table"])
    assert tried_tiles.issuperset(in_use)
    table = last["table"]["16"]
    assert [rows["rows"] for rows in table["grouped"]] == [8, 32, 128, None]
    assert {tile["gate_up"][1] for tile in entries} == {64}
    assert {tile["down"][1] for tile in entries if tile["range"].endswith("rows")} == {128}
    assert all(rows["gate_up"][0] == rows["down"][0] for rows in table["grouped"])
    assert report.tiles_text([last]) == f"90: {json.dumps(last['table'])}"


# Parts and report


def test_a_part_that_fails_is_recorded_and_the_check_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No part is replaced: where there is no GPU, both fail by themselves, each in its own process."""
    run_part = gpu_check.run_part
    known = {"kind": "facts", "gpu": "No GPU at all", "sm": 90}
    monkeypatch.setattr(
        gpu_check, "run_part", lambda name, *rest, **more: [known] if name == "facts" else run_part(name, *rest, **more)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "results.json"
    assert gpu_check.main(["--only", "layers", "--only", "engine", "--json", str(output)]) == 1
    written = json.loads(output.read_text())
    assert written["machine"]["sm"] == 90
    assert len(written["failures"]) == 1
    assert written["failures"][0].startswith("layers: : ")
    printed = capsys.readouterr().out
    assert "1 failures" in printed
    assert "engine trt:sm90: tensorrt is not installed" in printed
    assert f"written to {output}" in printed


def test_results_are_written_as_they_come_and_those_of_other_parts_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    seen: list[list[str]] = []

    def results() -> list[str]:
        return [entry["kind"] for entry in json.loads(output.read_text())["results"]] if output.exists() else []

    def run_part(name: str, _: Any, folder: Path, *__: Any, **___: Any) -> list[dict[str, Any]]:
        entry = {"kind": name, "part": name, "gpu": "G", "sm": 90}
        if name == "engine":
            (folder / "engine-90.jsonl").write_text(json.dumps(entry) + "\n" + '{"kind": "cut')
            while "engine" not in results():
                time.sleep(0.01)
            seen.append(results())
            raise KeyboardInterrupt
        return [entry]

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "TOLD_SECONDS", 0.01)
    gpu_check.main(["--only", "layers", "--json", str(output)])
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--only", "plugin", "--only", "engine", "--json", str(output)])
    assert seen == [["layers", "plugin", "engine"]]
    gpu_check.main(["--only", "plugin", "--json", str(output)])
    assert results() == ["layers", "engine", "plugin"]


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    entries = gpu_check.run_part("checks", {"sm": 90}, tmp_path, seconds=0.05, grace=0.05)
    assert entries == [{"kind": "checks", "part": "checks", "error": "took more than 0 s"}]


def test_a_part_begins_nothing_after_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run() -> Iterator[dict[str, Any]]:
        yield {"kind": "check", "op": "one"}
        pytest.fail("begun")

    monkeypatch.setitem(sys.modules, "bench.gpu.stub", types.SimpleNamespace(run=run))
    assert part.main("stub", str(tmp_path / "out"), "0") == 0
    entries = gpu_check.written(tmp_path / "out")
    assert entries[1:] == [{"kind": "stub", "stopped": "after 0 s", "part": "stub"}]
    assert report.failures(entries) == []
    assert "stub: stopped after 0 s" in report.text_of(entries)


def test_entries_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(sm: int) -> Iterator[dict[str, Any]]:
        yield {"kind": "check", "op": "one", "worst": float(sm)}
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(sys.modules, "bench.gpu.stub", types.SimpleNamespace(run=run))
    assert part.main("stub", str(tmp_path / "out"), "60", "sm=90") == 1
    first, second = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert first == {"kind": "check", "op": "one", "worst": 90.0, "part": "stub"}
    assert second["error"] == "RuntimeError: two lines"
    assert "in run" in second["trace"]


def layer_entry(tokens: int, **changes: Any) -> dict[str, Any]:
    entry = {"kind": "layer", "layer": "L", "weights": "bfloat16", "tokens": tokens, "active": 8.0}
    entry |= {"experts_seconds": 1e-4, "router_seconds": 2e-6, "of_bandwidth": 0.9, "of_peak": 0.7}
    return entry | {"peer_experts_seconds": 2e-4, "peer_router_seconds": 1e-5} | changes


def test_tables_show_times_fractions_and_the_peer() -> None:
    entries = [layer_entry(1), layer_entry(4096, of_bandwidth=0.125), layer_entry(8, weights="int4")]
    for name in ("peer_experts_seconds", "peer_router_seconds"):
        del entries[2][name]
    entries.append({"kind": "layer", "layer": "M", "weights": "int8", "skipped": "needs 9 GB"})
    first, second, skipped = report.layer_tables(entries)
    assert first.splitlines()[0] == "L, weights bfloat16"
    assert first.splitlines()[2].split() == [
        "1",
        "8",
        "100.0",
        "90",
        "%",
        "70",
        "%",
        "200.0",
        "2.00",
        "x",
        "2.0",
        "10.0",
    ]
    assert len({len(line) for line in first.splitlines()[1:]}) == 1
    assert second.splitlines()[2].split()[-5:] == ["%", "-", "-", "2.0", "-"]
    assert skipped == "M, weights int8: needs 9 GB"
    assert report.table("nothing", ("a",), []) == ""


def test_aims_take_the_slowest_layer() -> None:
    entries = [
        layer_entry(1, of_bandwidth=0.8),
        layer_entry(1),
        layer_entry(4096),
        layer_entry(64, experts_seconds=4e-4),
    ]
    found = {aim["aim"].split(":")[0].split(",")[0]: (aim["reached"], aim["met"]) for aim in report.aims(entries)}
    assert found == {"1 token": (0.8, False), "4096 tokens": (0.7, True), "times as fast as grouped_mm": (0.5, False)}
    assert report.aims([]) == []
    assert report.aims([layer_entry(1, weights="int4")]) == []
    alone = layer_entry(1, error="grouped_mm: RuntimeError: no")  # where the peer fails, our own aims stand
    del alone["peer_experts_seconds"]
    assert [(aim["reached"], aim["met"]) for aim in report.aims([alone])] == [(0.9, True)]


def test_correctness_counts_ops_and_wrong_ones() -> None:
    entries = [
        {"kind": "check", "op": "a", "worst": 0.001, "allowed": 0.01},
        {"kind": "check", "op": "b", "error": "ValueError: no"},
        {"kind": "plugin", "op": "c", "worst": 0.02, "allowed": 0.01, "error": "off by 0.02"},
    ]
    lines = report.correctness_table(entries).splitlines()
    assert lines[2].split() == ["kernels", "against", "the", "spec", "2", "0.1", "1"]
    assert lines[3].split() == ["plugin", "library", "1", "2", "1"]
    assert report.failures(entries) == ["check: b: ValueError: no", "plugin: c: off by 0.02"]
    assert report.text_of(entries).endswith("2 failures\ncheck: b: ValueError: no\nplugin: c: off by 0.02")
    assert report.text_of(entries[:1]).endswith("no failures")


def test_results_are_json_even_where_numbers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "sub" / report.file_name("NVIDIA H100 80GB HBM3")
    report.write(path, {"gpu": "x"}, [{"kind": "check", "op": "a", "worst": float("inf"), "list": [float("nan"), 1]}])
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    written = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert written["results"] == [{"kind": "check", "op": "a", "worst": None, "list": [None, 1]}]
    assert [each.name for each in path.parent.iterdir()] == [path.name]
