"""`moevlm inspect`, `run` and `bench latency` on a bundle with a TensorRT engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moevlm.runtime.backends.registry import backend_of
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.gpu_models import GPU_MODELS
from moevlm.runtime.core.gpus import gpu_text
from moevlm.runtime.perf import machine
from moevlm.runtime.perf.limits import cache_bytes_per_token, decode_work
from tests.support.bundles import edit_manifest, rehash
from tests.support.command_line import assert_refused, call
from tests.support.fakes.gpu import EXPERTS, LIMITS, TARGET, fake_gpu, gpu_bundle


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_bundle(tiny_bundle, tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.moevlm"))


def test_inspect_shows_what_an_engine_was_built_for_without_a_gpu(bundle) -> None:
    shown = call("inspect", bundle)
    assert shown.status == 0, shown.err
    (line,) = [line for line in shown.out.splitlines() if "tensorrt_rtx" in line]
    size = f"{(bundle / EXPERTS).stat().st_size / 1000:.1f} kB"
    for text in (TARGET, "tensorrt_rtx 1.7.1.116", "sm86, sm89", "float32", size, "5 sequences, 21 tokens", "512"):
        assert text in line
    report = json.loads(call("inspect", bundle, "--json").out)
    found = {engine["target"]: engine for engine in report["engines"]}
    assert found[TARGET]["tensorrt"].items() >= LIMITS.items()
    assert found[TARGET]["problems"] == []
    assert found["reference"]["tensorrt"] is None


def test_inspect_says_what_an_engine_takes_of_a_gpu_and_what_fits(bundle) -> None:
    shown = call("inspect", bundle)
    assert f"{TARGET} takes 1.3 GB of a GPU: " in shown.out
    rows = {line.split("  ")[0]: line for line in shown.out.splitlines() if " tokens " in line and " at once: " in line}
    assert set(rows) == {model.name for model in GPU_MODELS if model.sm in (86, 89)}
    engines = json.loads(call("inspect", bundle, "--json").out)["engines"]
    memory = {engine["target"]: engine["memory"] for engine in engines}
    assert memory["reference"] is None
    found, opened = memory[TARGET], Bundle.open(bundle).manifest
    engine = opened.engines[TARGET]
    assert found["experts"] == engine.cost.expert_bytes * opened.model.layers[-1].experts
    assert found["page"] == found["page_tokens"] * cache_bytes_per_token(engine)
    for fit in found["gpus"]:
        assert f"{fit['tokens']:,} tokens" in rows[fit["gpu"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "1.6.0.1"}, "says version 1.7.1.116, manifest.json says 1.6.0.1"),
        ({"sms": [89]}, "says GPUs sm86, sm89, manifest.json says sm89"),
        ({"product": "tensorrt"}, "says product tensorrt_rtx, manifest.json says tensorrt"),
    ],
)
def test_inspect_names_where_a_plan_contradicts_the_manifest(copy, change, reason) -> None:
    edit_manifest(copy, lambda manifest: manifest["engines"][TARGET]["tensorrt"].update(change))
    shown = call("inspect", copy)
    assert shown.status == 2
    assert TARGET in shown.out
    assert len(shown.errors) == 1
    assert shown.errors[0].startswith("error: ")
    assert f"{TARGET}: engines/rtx-sm86-sm89-fp32/vision.plan {reason}" in shown.errors[0]
    as_json = call("inspect", copy, "--json")
    assert as_json.status == 2
    (engine,) = [engine for engine in json.loads(as_json.out)["engines"] if engine["target"] == TARGET]
    assert len(engine["problems"]) == 2


def test_a_plan_that_is_none_or_cut_or_gone_is_a_problem(copy) -> None:
    opened = Bundle.open(copy)
    engine = opened.manifest.engines[TARGET]
    with (copy / engine.vision).open("ab") as file:
        file.write(b"more")
    (copy / engine.decoder).write_bytes(b"vtrt")
    size = (copy / engine.vision).stat().st_size
    assert backend_of(engine).problems(opened, engine) == [
        f"{engine.vision} says size {size - 4}, the file has {size}",
        f"{engine.decoder} is no plan of TensorRT, manifest.json says tensorrt_rtx 1.7.1.116",
    ]
    (copy / engine.decoder).unlink()
    assert backend_of(engine).problems(opened, engine)[1] == f"{copy / engine.decoder} is missing"
    reference = opened.manifest.engines["reference"]
    assert backend_of(reference).problems(opened, reference) == []


def test_run_answers_on_the_gpu_by_default_as_on_the_cpu(bundle, tmp_path) -> None:
    arguments = ("run", bundle, "--prompt", "Hello", "--max-new-tokens", "6", "--json")
    with fake_gpu(tmp_path) as gpu:
        ours = call(*arguments)
        assert ours.status == 0, ours.err
        assert not gpu.held()
        on_host = call(*arguments, "--experts-in", "host")
        assert on_host.status == 0, on_host.err
        assert not gpu.held()
    with fake_gpu(tmp_path, devices=0):
        theirs = call(*arguments, "--target", "reference")
        refused = call(*arguments, "--target", "reference", "--experts-in", "host:1")
        assert_refused(refused, "experts_in = host:1 has no effect on reference: it is for engines on a GPU")
        assert_refused(
            call(*arguments, "--target", "rtx"),
            f"no engine for this machine in {bundle}: it has {TARGET} (needs {gpu_text(86)} or {gpu_text(89)})",
            "this machine has no NVIDIA GPU",
            "(use --target ort-cpu)",
        )
    found, expected = json.loads(ours.out), json.loads(theirs.out)
    assert (found["target"], expected["target"]) == (TARGET, "reference")
    assert found["token_ids"] == json.loads(on_host.out)["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize("refuses", [False, True])
def test_bench_times_the_gpu_beside_the_limit_of_its_memory(bundle, tmp_path, monkeypatch, refuses) -> None:
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 20)
    with fake_gpu(tmp_path) as gpu:
        gpu.trt.state["record"] = not refuses
        arguments = ("--prompt-tokens", "20", "--new-tokens", "4", "--image-size", "24", "--repeats", "1")
        shown = call("bench", "latency", bundle, *arguments, "--json", "-", "--threads", "1")
        assert shown.status == 0, shown.err
        assert not gpu.held()
    report = json.loads(shown.out)
    assert report["machine"] is None
    assert report["gpu"] == {"name": "Fake GPU", "copied": pytest.approx(gpu.driver.bandwidth)}
    (result,) = report["results"]
    assert result["target"] == TARGET
    assert result["threads"] is result["prefill_limit"] is result["vision_limit"] is None
    found, engine = result["decode_limit"], Bundle.open(bundle).manifest.engines[TARGET]
    work = decode_work(Bundle.open(bundle).manifest.model, engine, engine.cost, report["prompt_tokens"] + 2)
    assert (found["bytes"], found["bound"]) == (round(work.bytes), "memory")
    assert found["seconds"] == pytest.approx(work.bytes / gpu.driver.bandwidth)
    assert found["fraction"] == pytest.approx(found["seconds"] / result["decode_token"]["median"])
    if refuses:
        assert result["graphs"].startswith("refused: ")
        assert f"{TARGET} queues every step anew" in shown.err
    else:
        assert result["graphs"] == "replayed"


def test_bench_shows_the_fraction_and_goes_on_where_the_gpu_has_no_room_to_measure(
    bundle, tmp_path, monkeypatch
) -> None:
    arguments = ("bench", "latency", bundle, "--prompt-tokens", "5", "--new-tokens", "2", "--image-size", "0")
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 20)
    with fake_gpu(tmp_path):
        shown = call(*arguments, "--repeats", "1")
        assert "Fake GPU: 500.0 GB/s copying its memory, matrix peak not measured" in shown.out
        (line,) = [line for line in shown.out.splitlines() if f"{TARGET} token" in line]
        assert "%" in line
        assert line.rstrip().endswith("memory")
    with fake_gpu(tmp_path) as gpu:
        over_link = call(*arguments, "--repeats", "1", "--experts-in", "host")
        assert not gpu.held()
    assert over_link.status == 0
    assert "of limit" not in over_link.out
    assert f"note: no limits beside the times of {TARGET}: the link to the host's memory" in over_link.err
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 40)
    with fake_gpu(tmp_path) as gpu:
        shown = call(*arguments, "--repeats", "1")
        assert not gpu.held()
    assert shown.status == 0
    assert "of limit" not in shown.out
    assert f"note: no limits beside the times of {TARGET}: cuMemAlloc failed" in shown.err


def test_bench_refuses_more_than_the_engine_s_context(bundle, tmp_path) -> None:
    with fake_gpu(tmp_path):
        refused = call("bench", "latency", bundle, "--prompt-tokens", "510", "--new-tokens", "4", "--image-size", "0")
        assert_refused(refused, "510 prompt tokens and 4 new ones are more than the context of 512")


def test_experts_that_no_file_lists_make_no_bundle(copy) -> None:
    edit_manifest(copy, lambda manifest: manifest["engines"][TARGET]["tensorrt"].update(experts="engines/none"))
    assert_refused(call("inspect", copy), "names engines/none, which files does not list")


def test_an_engine_s_files_include_the_experts(bundle) -> None:
    opened = Bundle.open(bundle)
    metadata = opened.manifest.engines[TARGET]
    assert {metadata.vision, metadata.decoder, EXPERTS} == set(opened.engine_files(TARGET))
    assert EXPERTS not in opened.engine_files("ort-cpu")


def test_inspect_verifies_plans_too(copy) -> None:
    name = Bundle.open(copy).manifest.engines[TARGET].vision
    assert call("inspect", copy, "--verify").status == 0
    data = bytearray((copy / name).read_bytes())
    data[70] ^= 1
    (copy / name).write_bytes(data)
    assert_refused(call("inspect", copy, "--verify"), f"{name} is damaged or was changed")
    rehash(copy, name)
    assert call("inspect", copy, "--verify").status == 0
