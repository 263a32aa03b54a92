"""Which engine a machine takes: by target, GPU, product and version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from moevlm.runtime.backends.selection import select
from moevlm.runtime.backends.tensorrt.library import find_module
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata, TensorRTMetadata
from moevlm.runtime.core.errors import BundleError, EngineError
from moevlm.runtime.core.gpus import gpu_text
from moevlm.runtime.core.installation import install_command
from tests.support.fakes.gpu import FakeGpu, fake_gpu

RTX = TensorRTMetadata(
    product="tensorrt_rtx",
    version="1.7.1.116",
    sms=(86, 89),
    activations="bfloat16",
    experts="engines/x",
    max_sequences=1,
    max_tokens=2,
    max_logits=1,
    max_visual=2,
    max_patches=1,
    max_pages=2,
)
CPU = EngineMetadata(vision="v", decoder="d", dtype="float32", states=())
INT8, INT4 = (msgspec.structs.replace(CPU, dtype=dtype) for dtype in ("int8", "int4"))


def engine(**changes: object) -> EngineMetadata:
    return msgspec.structs.replace(CPU, tensorrt=msgspec.structs.replace(RTX, **changes))


@pytest.fixture
def bundle(tiny_bundle: Path):
    """Makes a bundle of these engines, as far as its manifest goes."""
    opened = Bundle.open(tiny_bundle)
    return lambda **engines: replace(
        opened,
        manifest=msgspec.structs.replace(opened.manifest, engines={n.replace("_", ":"): e for n, e in engines.items()}),
    )


@contextmanager
def machine(folder: Path, sm: int | None = 89) -> Iterator[FakeGpu]:
    with fake_gpu(folder, sm=(0, 0) if sm is None else divmod(sm, 10), devices=0 if sm is None else 1) as gpu:
        yield gpu


def refused(opened: Bundle, target: str | None, *texts: str) -> None:
    with pytest.raises(BundleError) as info:
        select(opened, target)
    for text in texts:
        assert text in str(info.value)
    assert "\n" not in str(info.value)


def test_without_a_target_the_gpu_s_engine_comes_first_where_it_runs(bundle, tmp_path) -> None:
    opened = bundle(cpu_int8=CPU, **{"rtx_a": engine(), "rtx_b": engine(sms=(120,))})
    for sm, expected in ((89, "rtx:a"), (86, "rtx:a"), (120, "rtx:b"), (90, "cpu:int8"), (None, "cpu:int8")):
        with machine(tmp_path, sm):
            assert select(opened)[0] == expected


def test_another_version_of_the_product_does_not_count(bundle, tmp_path) -> None:
    opened = bundle(cpu_int8=CPU, rtx_a=engine(version="1.6.0.1"))
    with machine(tmp_path):
        assert select(opened)[0] == "cpu:int8"
        refused(opened, "rtx:a", "rtx:a (needs tensorrt_rtx 1.6.0.1 (installed: tensorrt_rtx 1.7.1.116))")


def test_a_bundle_without_gpu_engines_never_looks_for_a_gpu(bundle, tmp_path) -> None:
    with machine(tmp_path) as gpu:
        assert select(bundle(cpu_int8=CPU))[0] == "cpu:int8"
        assert select(bundle(cpu_int8=CPU, rtx_a=engine()), "cpu:int8")[0] == "cpu:int8"
    assert not gpu.driver.faults.calls


def test_where_nothing_fits_it_says_what_there_is(bundle, tmp_path) -> None:
    opened = bundle(rtx_a=engine(sms=(86, 120)), rtx_b=engine(sms=(89,)), cpu_int4=CPU)
    with machine(tmp_path, None):
        refused(
            opened,
            "rtx",
            "no engine for this machine in",
            f"it has rtx:a (needs {gpu_text(86)} or {gpu_text(120)}), rtx:b (needs {gpu_text(89)})",
            "this machine has no NVIDIA GPU that this process may use (use --target cpu:int4)",
        )
        refused(bundle(rtx_a=engine()), None, "no engine for this machine", "no NVIDIA GPU")
    with machine(tmp_path, 90):
        refused(opened, "rtx:b", "this machine has Fake GPU, sm90 (use --target cpu:int4)")


def test_a_target_is_a_full_name_or_a_beginning(bundle, tmp_path) -> None:
    opened = bundle(cpu_int8=CPU, cpu_int4=CPU, **{"rtx_sm89_bf16": engine(), "rtx_sm120_bf16": engine(sms=(120,))})
    with machine(tmp_path):
        for target in ("rtx", "rtx:sm89", "rtx:sm89:bf16"):
            assert select(opened, target)[0] == "rtx:sm89:bf16"
        refused(opened, "rtx:sm120", "needs sm120 (RTX 50, RTX PRO 6000)")
        refused(opened, "cp", "no engine 'cp'", "available: cpu:int4, cpu:int8, rtx:sm120:bf16, rtx:sm89:bf16")
        refused(opened, "rtx:sm8", "no engine 'rtx:sm8'")
    exact = bundle(cpu=CPU, cpu_int8=INT8)
    assert select(exact, "cpu")[0] == "cpu"


def test_a_target_may_name_a_gpu_as_people_do(bundle, tmp_path) -> None:
    plans = {"rtx_sm86,sm89_bf16": engine(), "rtx_sm86,sm89_bf16-int4": engine(), "rtx_sm120_bf16": engine(sms=(120,))}
    opened = bundle(cpu_int8=CPU, **plans)
    both = ["rtx:sm86,sm89:bf16", "rtx:sm86,sm89:bf16-int4"]
    for target in ("rtx:4090", "rtx:RTX 4090", "rtx:sm89", "rtx:8.9", "rtx:L40S,3090", "rtx:sm89,sm86"):
        assert opened.matches(target) == both, target
    assert opened.matches("rtx:4090:bf16") == both[:1]
    assert opened.matches("rtx:5090") == ["rtx:sm120:bf16"]
    for target in ("rtx:4090,5090", "rtx:4090:fp16", "rtx:4090:int4", "trt:4090", "rtx:nothing", "rtx:", "4090"):
        refused(opened, target, "no engine")
    with machine(tmp_path, 89):
        assert select(opened, "rtx:4090")[0] in both


def test_of_several_that_run_int8_comes_first_and_the_fastest_kind(bundle, tmp_path) -> None:
    on_cpu = {"reference": CPU, "ort-cpu": CPU, "ort-cpu_int8": INT8, "cpu_int4": INT4, "cpu_int8": INT8}
    with machine(tmp_path, 89):
        for names, target, expected in (
            (on_cpu, None, "cpu:int8"),
            (on_cpu, "cpu", "cpu:int8"),
            (on_cpu, "ort-cpu", "ort-cpu"),
            ({"reference", "ort-cpu", "cpu_int4"}, None, "cpu:int4"),
            ({"reference", "ort-cpu"}, None, "ort-cpu"),
        ):
            assert select(bundle(**{name: on_cpu[name] for name in names}), target)[0] == expected
        plans = {"rtx_bf16": engine(), "rtx_bf16-int4": msgspec.structs.replace(engine(), dtype="int4")}
        assert select(bundle(**on_cpu, **plans))[0] == "rtx:bf16"
        assert select(bundle(**on_cpu, **plans), "rtx:bf16-int4")[0] == "rtx:bf16-int4"


def test_a_bundle_without_engines_says_how_to_build_one(bundle) -> None:
    refused(bundle(), None, "has no engine yet (moevlm build")


@pytest.mark.parametrize(
    ("installed", "metadata", "expected"),
    [
        ({"tensorrt": "11.4.0.5"}, {"version": "11.4.0.5"}, "tensorrt"),
        ({"tensorrt": "11.4.0.5", "tensorrt_lean": "11.4.0.5"}, {"version": "11.4.0.5"}, "tensorrt"),
        ({"tensorrt_lean": "11.4.0.5"}, {"version": "11.4.0.5"}, None),
        ({"tensorrt_lean": "11.4.0.5"}, {"version": "11.4.0.5", "version_compatible": True}, "tensorrt_lean"),
        ({"tensorrt": "11.4.0.5"}, {"version": "11.4.0.5", "version_compatible": True}, "tensorrt"),
        (
            {"tensorrt": "11.4.0.5", "tensorrt_lean": "11.2.0.1"},
            {"version": "11.2.0.1", "version_compatible": True},
            "tensorrt_lean",
        ),
        ({"tensorrt": "11.4.0.5"}, {"version": "11.2.0.1", "version_compatible": True}, None),
        ({"tensorrt": "11.4.0.5"}, {"version": "11.2.0.1"}, None),
        ({}, {"version": "11.4.0.5"}, None),
    ],
)
def test_full_and_lean_tensorrt_by_version(monkeypatch, installed, metadata, expected) -> None:
    import sys

    for name in ("tensorrt", "tensorrt_lean"):
        module = ModuleType(name) if name in installed else None
        if module is not None:
            module.__version__ = installed[name]
        monkeypatch.setitem(sys.modules, name, module)
    wanted = msgspec.structs.replace(RTX, product="tensorrt", **metadata)
    if expected is not None:
        assert find_module(wanted).__name__ == expected
        return
    shown = ", ".join(f"{name} {version}" for name, version in installed.items())
    text = f"installed: {shown}" if installed else install_command("trt")
    with pytest.raises(EngineError, match=re.escape(f"needs tensorrt {metadata['version']} ({text})")):
        find_module(wanted)


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(EngineError, match=r"product = 'other' \(supported: tensorrt, tensorrt_rtx\)"):
        find_module(msgspec.structs.replace(RTX, product="other"))
