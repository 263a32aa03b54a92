"""Real TensorRT-RTX plans, built here without a GPU, with the package's own plugins and kernels."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from bench.variants import MODELS
from moevlm.export.backends.tensorrt import engine_target, machine, worker
from moevlm.export.backends.tensorrt.compiled_programs import CompiledPrograms
from moevlm.export.backends.tensorrt.onnx_file import write_onnx
from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN
from moevlm.export.backends.tensorrt.passes.plugin_moe import PluginMoE
from moevlm.export.backends.tensorrt.plan_builder import Job, build_plan
from moevlm.export.build import add_targets, build
from moevlm.export.checkpoint.safetensors_file import read_header
from moevlm.export.formats.float4 import Float4Format
from moevlm.export.formats.gpu_packing import unpack
from moevlm.export.passes.base import run
from moevlm.plugins.gpu import compiler
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.ops.spec import ExpertsSpec
from moevlm.runtime.backends.libraries import plugin_path
from moevlm.runtime.backends.tensorrt.plan_header import HEADER_BYTES, PlanHeader, plan_header
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.dtypes import E4M3
from moevlm.runtime.core.errors import BuildError, BundleError
from moevlm.runtime.core.printable import bytes_text
from moevlm.runtime.core.states import PagedKV, Recurrent
from tests.export.backends.tensorrt.test_passes import with_sizes
from tests.support.bundles import copy_bundle, rehash
from tests.support.command_line import assert_refused, call
from tests.support.fakes.tensorrt_builder import FakeTensorRT
from tests.support.moe_cases import Case
from tests.support.published import FORMATS
from tests.support.tiny import TinyCheckpoint, edit_tensors

DEMO = Path(__file__).parents[4] / "demo" / "checkpoint"
NAME = "rtx:sm86,sm89:bf16"
KERNELS = "engines/rtx-sm86-sm89-bf16/kernels.json"


def header(bundle: Bundle, name: str) -> PlanHeader:
    data = bundle.path(name).read_bytes()
    found = plan_header(data[:HEADER_BYTES])
    assert found is not None
    assert found.length == len(data) == bundle.manifest.files[name].size
    return found


def test_one_plan_is_for_all_gpus_asked_for(rtx_bundle: Bundle) -> None:
    assert [*rtx_bundle.manifest.engines] == [NAME]
    engine = rtx_bundle.manifest.engines[NAME]
    assert engine.tensorrt is not None
    for plan in (engine.vision, engine.decoder):
        found = header(rtx_bundle, plan)
        assert (found.product, found.sms) == ("tensorrt_rtx", (86, 89))
        assert found.version == engine.tensorrt.version
    assert (engine.dtype, engine.kv_cache, engine.tensorrt.sms) == ("bfloat16", "bfloat16", (86, 89))
    chunk = rtx_bundle.manifest.model.context  # which is shorter than a chunk could be
    assert (engine.tensorrt.max_sequences, engine.tensorrt.max_tokens) == (64, chunk + 64)
    assert (engine.page_size, engine.tensorrt.max_patches) == (64, 4096)


def test_experts_lie_beside_the_plans_and_belong_to_the_engine(rtx_bundle: Bundle) -> None:
    engine = rtx_bundle.manifest.engines[NAME]
    assert engine.tensorrt is not None
    experts = engine.tensorrt.experts
    assert experts == "experts/bf16.safetensors"
    assert set(rtx_bundle.engine_files(NAME)) == {engine.vision, engine.decoder, experts, KERNELS}
    tensors = read_header(rtx_bundle.path(experts))
    assert {name: stored.shape for name, stored in tensors.items()} == {
        f"layers.{i}.feed_forward.{name}": shape
        for i in range(2)
        for name, shape in (("gate_up", (8, 48, 32)), ("down", (8, 32, 24)))
    }
    rtx_bundle.verify()


def test_kernels_are_listed_with_what_they_take(rtx_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_Worker", None)  # nothing is compiled again
    ops = json.loads(rtx_bundle.read_bytes(KERNELS))
    assert [op["op"] for op in ops] == ["SegmentAttention", "PagedAttention", "MoERouter", "MoEExperts", "Candidates"]
    moe = ops[3]
    assert (moe["attributes"]["hidden"], moe["attributes"]["inner"]) == (32, 24)
    experts = ExpertsOp(ExpertsSpec(), 8, 2, 32, 24)
    taken = [(kernel["sm"], kernel["registers"], kernel["shared"], kernel["spilled"]) for kernel in moe["kernels"]]
    assert taken == [(r.sm, r.registers, r.shared, r.spilled) for r in compiler.resources(experts, (86, 89))]
    named = {(kernel["sm"], kernel["kernel"]) for op in ops for kernel in op["kernels"]}
    assert named >= {(sm, kernel) for sm in (86, 89) for kernel in ("route", "few_gate_up", "grouped_down")}
    tiles = [kernel["tile"] for kernel in moe["kernels"] if kernel["kernel"] == "grouped_down"]
    assert all(set(tile) == {"BM", "BN", "BK"} for tile in tiles)
    shared, spilled = max(shared for _, _, shared, _ in taken), max(spilled for *_, spilled in taken)
    (line,) = [line for line in call("inspect", rtx_bundle.directory).out.splitlines() if " kernels, " in line]
    assert line.startswith(f"{NAME}: {sum(len(op['kernels']) for op in ops)} kernels, up to {bytes_text(shared)} of")
    assert line.endswith("no spills" if not spilled else f"{spilled} bytes a thread")


def test_kernels_that_are_no_list_are_named(rtx_bundle: Bundle, tmp_path: Path) -> None:
    copy = copy_bundle(rtx_bundle.directory, tmp_path)
    (copy / KERNELS).write_text("{}")
    rehash(copy, KERNELS)
    assert_refused(call("inspect", copy), f"{KERNELS}: Expected `array`, got `object`")


def test_damaged_experts_are_found(rtx_bundle: Bundle) -> None:
    path = rtx_bundle.path("experts/bf16.safetensors")
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"experts/bf16.safetensors is damaged"):
            rtx_bundle.verify(rtx_bundle.engine_files(NAME))
    finally:
        path.write_bytes(data)


def test_second_engine_of_a_precision_shares_the_experts(tiny_checkpoint: Path, rtx_bundle: Bundle) -> None:
    before = rtx_bundle.path("experts/bf16.safetensors").stat().st_ino
    grown = add_targets(
        rtx_bundle.directory, tiny_checkpoint, ["rtx:sm89"], chunk_tokens=64, max_sequences=2, kv_cache="int8"
    )
    assert {NAME, "rtx:sm89:bf16"} == {*grown.manifest.engines}
    assert grown.path("experts/bf16.safetensors").stat().st_ino == before
    added = grown.manifest.engines["rtx:sm89:bf16"]
    assert header(grown, added.decoder).sms == (89,)
    assert added.tensorrt is not None
    assert (added.tensorrt.max_tokens, added.tensorrt.max_sequences, added.kv_cache) == (66, 2, "int8")
    assert [name for name in grown.manifest.files if name.startswith("experts/")] == ["experts/bf16.safetensors"]


def test_plans_of_gemma4_with_fp8_experts_and_an_int8_cache(
    tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    """Heads of two sizes, image tokens that see each other, a factor for each expert, a tower that pools."""
    out = tmp_path / "gemma4.moevlm"
    built = build(save_checkpoint(model_type="gemma4"), out, ["rtx:sm89"], experts="fp8", kv_cache="int8")
    (name,) = built.manifest.engines
    engine = built.manifest.engines[name]
    for plan in (engine.vision, engine.decoder):
        assert header(built, plan).sms == (89,)
    ops = Counter(op["op"] for op in json.loads(built.read_bytes(f"engines/{name.replace(':', '-')}/kernels.json")))
    found = {"SegmentAttention": 1, "PagedAttention": 2, "MoERouter": 1, "MoEExperts": 1, "Candidates": 1}
    assert ops == found
    assert {state.key_dim for state in engine.states} == {16, 32}


def test_plan_of_nvfp4_experts_as_the_checkpoint_holds_them(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 160, "moe_intermediate_size": 96, "num_experts": 4}
    floats = TinyCheckpoint("qwen3_moe", text=sizes).save(tmp_path / "floats")
    checkpoint = FORMATS["nvfp4"].publish(
        floats, tmp_path / "nvfp4", tmp_path / "plain", lambda name: ".experts." in name
    )
    built = build(checkpoint, tmp_path / "b.moevlm", ["rtx:sm86"])
    engine = built.manifest.engines["rtx:sm86:bf16-fp4"]
    assert (engine.dtype, engine.group_size) == ("fp4", 16)
    assert (engine.recoded, engine.weight_errors) == ({"fp4 kept": 2}, {})
    assert engine.tensorrt is not None
    stored = load_file(built.path(engine.tensorrt.experts))
    plain = load_file(tmp_path / "plain/model.safetensors")
    for part, names in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
        values, *others = (stored[f"layers.0.feed_forward.{part}{end}"] for end in ("", "_scale", "_row_scale"))
        experts = [[plain[f"model.layers.0.mlp.experts.{e}.{name}.weight"] for name in names] for e in range(4)]
        exact = np.stack([np.concatenate(expert) for expert in experts])
        found = unpack(values, others[0], Float4Format(16, E4M3), exact.shape[2], row_scales=others[1])
        np.testing.assert_array_equal(found, exact)


def test_command_builds_for_turing_with_the_int4_experts_of_a_checkpoint(
    tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    floats = save_checkpoint(model_type="glm4v_moe", text={"max_position_embeddings": 262144})
    checkpoint = FORMATS["awq-128"].publish(floats, tmp_path / "awq", tmp_path / "plain")
    out = tmp_path / "glm.moevlm"
    done = call("build", checkpoint, "-o", out, "--target", "rtx:sm75", "--dtype", "fp16")
    assert (
        f"next, on a machine with sm75 (T4, RTX 20, GTX 16, Quadro RTX): moevlm parity {out} --checkpoint {checkpoint}"
        in done.out
    )
    built = Bundle.open(out)
    engine = built.manifest.engines["rtx:sm75:fp16-int4"]
    assert (engine.dtype, engine.group_size, engine.kv_cache) == ("int4", 128, "float16")
    assert built.manifest.model.context == 262144  # which no tensor grows with
    assert engine.tensorrt is not None and engine.tensorrt.max_tokens == 2048 + 64
    tensors = read_header(built.path("experts/fp16-int4-g128-v3.safetensors"))
    stored = {name.rpartition(".")[2]: (str(found.dtype), found.shape) for name, found in tensors.items()}
    assert stored == {
        "gate_up": ("int8", (8, 48, 64)),
        "gate_up_scale": ("float16", (8, 1, 48)),
        "gate_up_zero": ("int32", (8, 1, 6)),
        "down": ("int8", (8, 32, 64)),
        "down_scale": ("float16", (8, 1, 32)),
        "down_zero": ("int32", (8, 1, 4)),
    }
    assert engine.recoded["int4 kept"] == len(tensors) // 3 == 2
    assert engine.weight_errors.keys() == {"int4 with zeros to float16"}  # of the others
    assert 0 < engine.weight_errors["int4 with zeros to float16"] < 2**-11
    assert header(built, engine.decoder).sms == (75,)


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [("qwen3_5_moe", [Recurrent, Recurrent, PagedKV]), ("qwen3_omni_moe", [PagedKV, PagedKV])],
)
def test_decoder_and_tower_of_a_family_build(
    model_type: str, kinds: list[type], tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    built = build(save_checkpoint(model_type=model_type, text={"vocab_size": 96}), tmp_path / "b", ["rtx:sm89"])
    engine = built.manifest.engines["rtx:sm89:bf16"]
    assert [type(state) for state in engine.states] == kinds
    assert header(built, engine.decoder).sms == header(built, engine.vision).sms == (89,)


def test_demo_checkpoint_builds(tmp_path: Path) -> None:
    built = build(DEMO, tmp_path / "demo.moevlm", ["rtx:sm89"])
    engine = built.manifest.engines["rtx:sm89:bf16"]
    assert header(built, engine.decoder).sms == header(built, engine.vision).sms == (89,)
    assert engine.cost is not None
    experts = built.manifest.files["experts/bf16.safetensors"].size
    assert 0 < engine.cost.expert_bytes * built.manifest.model.layers[-1].experts < experts


@pytest.mark.parametrize("name", MODELS)
def test_block_of_every_router_builds_with_its_plugins(name: str, tmp_path: Path) -> None:
    bias = name.startswith(("glm", "deepseek_v3"))
    case = Case(replace(MODELS[name], top_k=2), ExpertsSpec(), router_bias=bias, hidden=32, inner=32)
    model = with_sizes(case)
    x = model.graph.inputs[1]
    for value in (x, model.graph.outputs[0]):
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    run([PluginMoE("float16", "", 32, lambda op: compile_program(op, [89]).to_bytes())], model)
    assert {node.domain for node in model.graph} == {DOMAIN}
    write_onnx(model, tmp_path / "block.onnx")
    shapes = {"logits": tuple((t, case.experts) for t in (1, 8, 64)), "x": tuple((t, 32) for t in (1, 8, 64))}
    job = Job(
        product="tensorrt_rtx",
        onnx=str(tmp_path / "block.onnx"),
        plan=str(tmp_path / "block.plan"),
        sms=(89,),
        profiles=[shapes, shapes],  # type: ignore[list-item]
        links=str(tmp_path),
        plugins=str(plugin_path()),
        plugin_layers=2,
    )
    built = worker.run(job, lambda *_: None)
    assert built.file.size == (tmp_path / "block.plan").stat().st_size


def test_nothing_is_left_where_tensorrt_refuses_a_graph(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledPrograms, "of", lambda *_: b"no program")
    message = r"^TensorRT-RTX [\d.]+ refused vision.onnx: SegmentAttention: .*program"
    with pytest.raises(BuildError, match=message):
        build(tiny_checkpoint, tmp_path / "out.moevlm", ["rtx:sm89"])
    assert not list(tmp_path.iterdir())


def test_size_that_no_kernel_takes_is_refused_by_name(tmp_path: Path, save_checkpoint: Callable[..., Path]) -> None:
    checkpoint = save_checkpoint(vision={"hidden_size": 600, "num_heads": 2})
    with pytest.raises(BuildError, match=r"^rtx:sm89:bf16 cannot run this model: head_dim = 300 \(allowed: an even"):
        build(checkpoint, tmp_path / "out.moevlm", ["rtx:sm89"])


def test_nothing_is_left_where_float16_cannot_hold_a_weight(
    tmp_path: Path, save_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = save_checkpoint()
    edit_tensors(checkpoint, lambda tensors: tensors["model.visual.patch_embed.proj.weight"].fill_(1e6))
    with pytest.raises(BuildError, match=r"patch_embedding.weight.*float16 has no numbers beyond 65504"):
        build(checkpoint, tmp_path / "out.moevlm", ["rtx:sm89"], dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_native_moe_of_tensorrt_needs_no_experts_beside_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT is a fake, everything in front of it real."""
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("11.4.0.1"))
    monkeypatch.setattr(machine, "current_sm", lambda: 100)
    decoders = []

    def in_this_process(job: Job, progress: Callable[[int, int], None]) -> object:
        if "decoder" in job.onnx:
            decoders.append(ir.load(job.onnx))
        monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("11.4.0.1", plugin_layers=job.plugin_layers))
        return build_plan(job, progress)

    monkeypatch.setattr(engine_target.worker, "run", in_this_process)
    options = {"native_moe": True, "version_compatible": True}
    built = build(tiny_checkpoint, tmp_path / "b200.moevlm", ["trt:sm100"], **options)
    metadata = built.manifest.engines["trt:sm100:bf16"].tensorrt
    assert metadata is not None
    assert (metadata.product, metadata.version, metadata.sms, metadata.experts) == ("tensorrt", "11.4.0.1", (100,), "")
    assert metadata.version_compatible
    kinds = Counter(node.op_type for node in decoders[0].graph)
    assert (kinds["TRT_MoE"], kinds["PagedAttention"], kinds["MoERouter"], kinds["Candidates"]) == (2, 2, 2, 1)
