"""Plans built through TensorRT's API: a strict fake of TensorRT's, and the errors of the real TensorRT-RTX."""

import errno
import os
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from moevlm.export.backends.tensorrt import machine, worker
from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.backends.tensorrt.plan_builder import Job, build_plan
from moevlm.export.backends.tensorrt.product import RTX, TENSORRT, load
from moevlm.export.backends.tensorrt.profiles import Range, decoder_profiles, max_pages, max_patches, vision_profiles
from moevlm.export.backends.tensorrt.target import targets as plan_targets
from moevlm.export.graph.op import ONNX_OPSET
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.states import PagedKV
from moevlm.runtime.core.towers import QueryTower, RotaryTower, TileTower
from tests.support.fakes.tensorrt_builder import PLAN, FakeTensorRT

VERSIONS = ("10.15.1.29", "11.4.0.1")
PROFILES = [{"x": ((1, 4), (2, 4), (8, 4))}, {"x": ((1, 4), (1, 4), (1, 4))}]


def job(folder: Path, **changes: object) -> Job:
    onnx = folder / "decoder.onnx"
    if not onnx.exists():
        onnx.write_bytes(b"")
    fields = {
        "product": "tensorrt",
        "onnx": str(onnx),
        "plan": str(folder / "decoder.plan"),
        "sms": (90,),
        "profiles": PROFILES,
        "links": str(folder),
    }
    return Job(**(fields | changes))  # type: ignore[arg-type]


def use(monkeypatch: pytest.MonkeyPatch, version: str, **behaviour: object) -> FakeTensorRT:
    fake = FakeTensorRT(version, **behaviour)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_is_asked_for_a_strongly_typed_plan_with_plugins(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = use(monkeypatch, version, plugin_layers=2)
    library = tmp_path / "plugins.so"
    library.write_bytes(b"")
    steps: list[tuple[int, int]] = []
    flags = ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "SPARSE_WEIGHTS")
    asked = job(tmp_path, plugins=str(library), plugin_layers=2, flags=flags)
    built = build_plan(asked, lambda *step: steps.append(step))
    assert (built.version, built.file.size) == (version, len(PLAN))
    assert (tmp_path / "decoder.plan").read_bytes() == PLAN
    assert (fake.parsed, fake.libraries) == ([asked.onnx], [str(library)])
    (config,) = fake.configs
    assert tuple(config.flags_set) == flags
    assert config.flags_cleared == ["TF32"]
    assert [profile.shapes for profile in config.profiles] == PROFILES
    assert steps[-1] == (2, 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("parse", 'node layers.0.scatter (TensorScatter): Assertion failed: mode == "linear"'),
        ("build", "Error Code 9: no kernel"),
    ],
)
def test_what_tensorrt_refuses_is_one_line(
    version: str, refuses: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, version, refuses=refuses)
    with pytest.raises(BuildError) as caught:
        build_plan(job(tmp_path), lambda *_: None)
    assert str(caught.value) == f"TensorRT {version} refused decoder.onnx: {message}"


def test_nodes_that_became_no_plugins_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, VERSIONS[0], plugin_layers=1)
    with pytest.raises(BuildError, match="it made 1 plugin layers of 2 nodes"):
        build_plan(job(tmp_path, plugin_layers=2), lambda *_: None)


def test_library_that_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, VERSIONS[0])
    with pytest.raises(BuildError, match=r"cannot load .*absent.so"):
        build_plan(job(tmp_path, plugins=str(tmp_path / "absent.so")), lambda *_: None)


def test_full_disk_ends_a_streamed_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, VERSIONS[1])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moevlm.export.backends.tensorrt.plan_builder.StreamedFile.write", full)
    with pytest.raises(OSError, match="No space left"):
        build_plan(job(tmp_path), lambda *_: None)


def test_rtx_names_the_node_that_it_refuses(tmp_path: Path) -> None:
    write_scatter(tmp_path / "decoder.onnx", "circular")
    with pytest.raises(BuildError, match=r"^TensorRT-RTX [\d.]+ refused decoder.onnx: node layers.0.scatter \(Tensor"):
        worker.run(job(tmp_path, product="tensorrt_rtx", sms=(89,), profiles=[]), lambda *_: None)


def test_system_s_errors_in_the_process_that_builds_are_raised_here(tmp_path: Path) -> None:
    write_scatter(tmp_path / "decoder.onnx", "linear")
    asked = job(
        tmp_path, product="tensorrt_rtx", sms=(89,), profiles=[], plan=str(tmp_path / "absent" / "decoder.plan")
    )
    with pytest.raises(FileNotFoundError):
        worker.run(asked, lambda *_: None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [(((1, 4), (8, 4), (2, 4)), "MIN<=OPT<=MAX"), (((1, 4), (1, 4), (-2, 4)), r"key up to \(-2, 4\): ")],
)
def test_sizes_that_tensorrt_refuses_are_one_line(sizes: Range, message: str, tmp_path: Path) -> None:
    write_scatter(tmp_path / "decoder.onnx", "linear")
    asked = job(tmp_path, product="tensorrt_rtx", sms=(89,), profiles=[{"key": sizes}])
    with pytest.raises(BuildError, match=rf"refused decoder.onnx: .*{message}") as caught:
        worker.run(asked, lambda *_: None)
    assert "\n" not in str(caught.value)


def test_folder_that_it_runs_in_brings_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('another module of that name')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match=r"refused decoder.onnx: "):
        worker.run(job(tmp_path, product="tensorrt_rtx", sms=(89,)), lambda *_: None)


def test_process_that_ends_without_a_word_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BuildError, match=r"^tensorrt ended while it built decoder.plan \(1\): it said nothing"):
        worker.run(job(tmp_path), lambda *_: None)


def test_rtx_that_was_imported_before_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_libs", FakeTensorRT("1.7"))
    with pytest.raises(BuildError, match="tensorrt_rtx was imported before"):
        load(RTX, tmp_path)


def write_scatter(path: Path, mode: str) -> None:
    cache = ir.Shape([2, 4, 8, 16])
    half = ir.TensorType(ir.DataType.FLOAT16)
    x, new = ir.Value(name="x", shape=cache, type=half), ir.Value(name="new", shape=ir.Shape([2, 4, 1, 16]), type=half)
    at = ir.Value(name="at", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    y = ir.Value(name="y", shape=cache, type=half)
    node = ir.node("TensorScatter", [x, new, at], {"mode": mode}, outputs=[y], name="layers.0.scatter")
    graph = ir.Graph([x, new, at], [y], nodes=[node], opset_imports={"": ONNX_OPSET}, name="g")
    path.write_bytes(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())


def model(**shapes: list[int | str]) -> ir.Model:
    inputs = [ir.Value(name=name, shape=ir.Shape(shape)) for name, shape in shapes.items()]
    return ir.Model(ir.Graph(inputs, [], nodes=[], name="g"), ir_version=11)


def test_profiles_cover_any_step_and_decode() -> None:
    decoder = model(
        input_ids=["tokens"],
        visual_embeds=["visual", 64],
        query_start=["starts"],
        page_table=["sequences", "table"],
        logits_index=["logits"],
        weight=[4, 8],
        key_cache=["pages", 4, 64, 9],
        value_cache=["pages", 4, 64, 16],
    )
    pages = max_pages([PagedKV(layer=0, kv_heads=4, key_dim=9, value_dim=16)])
    assert pages * 4 * 64 * 16 < 2**31 <= (pages + 1) * 4 * 64 * 16
    any_step, decode = decoder_profiles(decoder, Options(max_sequences=4, chunk_tokens=128), 7, pages, 0)
    assert any_step == {
        "input_ids": ((1,), (128,), (132,)),
        "visual_embeds": ((1, 64), (128, 64), (132, 64)),
        "query_start": ((2,), (5,), (5,)),
        "page_table": ((1, 1), (4, 7), (4, 7)),
        "logits_index": ((1,), (4,), (64,)),
        "key_cache": ((2, 4, 64, 9), (1024, 4, 64, 9), (pages, 4, 64, 9)),
        "value_cache": ((2, 4, 64, 16), (1024, 4, 64, 16), (pages, 4, 64, 16)),
    }
    ones = ("input_ids", "logits_index", "visual_embeds")
    assert decode == any_step | {name: tuple((n, *any_step[name][0][1:]) for n in (1, 4, 4)) for name in ones}


VISION = {"patch_size": 4, "channels": 3, "head_dim": 8, "rope_theta": 0.0}
GRAPH = {"pixel_patches": ["patches", 24], "image_start": ["starts"]}


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_vision_takes_whole_visual_tokens(merge: int) -> None:
    tower = RotaryTower(**VISION, merge_size=merge)
    patches = max_patches(tower.unit, 10_001)
    profile = vision_profiles(model(**GRAPH), tower, patches)[0]
    assert profile.keys() == GRAPH.keys()
    assert all(count % merge**2 == 0 and width == 24 for count, width in profile["pixel_patches"])
    assert profile["pixel_patches"][2][0] == patches == 10_001 // merge**2 * merge**2
    assert profile["image_start"] == ((2,), (2,), (patches // merge**2 + 1,))


def test_one_large_image_is_always_within_the_profile() -> None:
    """Images of one size, of more patches than are usual."""
    tower = TileTower(**VISION, merge_size=1, side=71)
    profile = vision_profiles(model(**GRAPH), tower, max_patches(tower.unit, 71**2))[0]
    assert [count for count, _ in profile["pixel_patches"]] == [71**2] * 3
    assert profile["image_start"][2] == (2,)


@pytest.mark.parametrize(("queries", "images"), [(256, 19), (1, 4900), (6000, 1)])
def test_images_that_all_have_as_many_visual_tokens_have_no_more_of_them_than_patches(
    queries: int, images: int
) -> None:
    """Or one image's, where that has more."""
    tower = QueryTower(**VISION, merge_size=1, queries=queries, side=70, position_grid=70)
    profile = vision_profiles(model(**GRAPH), tower, max_patches(tower.unit, 4900))[0]
    assert profile["pixel_patches"][2] == (4900, 24)
    assert profile["image_start"][2] == (images + 1,)
    assert tower.rows(4900, images) == images * queries


@pytest.mark.parametrize(("image", "patches"), [(None, 65536), (100, 4096), (16384, 16384), (10**9, 65536)])
def test_vision_takes_the_largest_image_of_the_checkpoint(image: int | None, patches: int) -> None:
    assert max_patches(4, image) == patches


def test_rtx_plans_are_for_several_gpus_and_tensorrt_s_for_the_one_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, VERSIONS[1])
    options = Options(experts="int4")
    (rtx,) = plan_targets("rtx:sm120,sm86,sm86", options)
    assert (rtx.name, rtx.sms) == ("rtx:sm86,sm120:bf16-int4", (86, 120))
    assert rtx.path("decoder") == "engines/rtx-sm86-sm120-bf16-int4/decoder.plan"
    monkeypatch.setattr(machine, "current_sm", lambda: 90)
    (trt,) = plan_targets("trt:sm90", options)
    assert (trt.name, trt.product) == ("trt:sm90:bf16-int4", TENSORRT)
    assert plan_targets("cpu:int8", options) == ()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rtx:sm90", {}, r'takes no GPU "sm90" \(allowed: sm75 \(T4, .*; "trt:sm90" is built on its own GPU\)'),
        ("rtx:", {}, "needs a GPU's name"),
        ("rtx:sm89,90", {}, 'takes no GPU "90"'),
        ("rtx:sm75,sm89", {}, "sm75 has no bfloat16 .use --dtype fp16"),
        ("rtx:sm89", {"version_compatible": True}, "version compatible: trt only"),
        ("rtx:sm120", {"native_moe": True}, "allowed: trt:sm100, trt:sm103, trt:sm110"),
        ("trt:sm90", {"native_moe": True}, "allowed: trt:sm100, trt:sm103, trt:sm110"),
        ("trt:sm100", {"native_moe": True, "experts": "int8"}, "experts = int8 with TensorRT's own MoE"),
        ("trt:sm80", {}, "this machine has sm90, not sm80"),
    ],
)
def test_target_that_cannot_be_built_is_refused_by_name(
    name: str, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, VERSIONS[1])
    monkeypatch.setattr(machine, "current_sm", lambda: 90)
    with pytest.raises(BuildError, match=message):
        plan_targets(name, Options(**options))[0].require_machine()


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BuildError, match=r"needs tensorrt \(pip install .*\[trt\]'\)"):
        plan_targets("trt:sm90", Options())[0].require_machine()


def test_missing_compiler_of_kernels_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        BuildError, match=r"target rtx:sm89:bf16: compiling its kernels needs triton \(pip install .*\[kernels"
    ):
        plan_targets("rtx:sm89", Options())[0].require_machine()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp32"}, r"dtype = 'fp32' \(allowed: bf16, fp16\)"),
        ({"experts": "int2"}, r"experts = 'int2' \(allowed: auto, same, int8, int4, fp8, fp4\)"),
        ({"group_size": 64}, r"group_size = 64 \(allowed: 16, 32, 128\)"),
        ({"max_sequences": 0}, r"max_sequences = 0 \(allowed: a whole number, 1 or more\)"),
        ({"chunk_tokens": -1}, r"chunk_tokens = -1 \(allowed: a whole number, 1 or more\)"),
        ({"kv_cache": "float32"}, r"kv_cache = 'float32' \(allowed: same, int8, fp8\)"),
    ],
)
def test_option_that_there_is_not_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        Options(**options)
