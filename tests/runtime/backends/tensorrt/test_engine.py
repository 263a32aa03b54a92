"""The engine on TensorRT, on a fake GPU that evaluates the canonical graphs: what it computes, keeps and gives back."""

from __future__ import annotations

import gc
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.runtime.backends.tensorrt.engine import TensorRTEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, EngineError, MoevlmError, RequestError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_engine, load_images, load_runtime
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.bundles import edit_manifest, rehash
from tests.support.fakes.gpu import EXPERTS, LIMITS, TARGET, FakeGpu, fake_gpu, gpu_bundle

TOLERANCE = 1e-5
Ids = list[int]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_bundle(tiny_bundle, tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[FakeGpu]:
    with fake_gpu(tmp_path) as found:
        yield found


@pytest.fixture
def runtime(bundle: Path, gpu: FakeGpu) -> Iterator[Runtime]:
    with load_runtime(bundle, TARGET) as loaded:
        yield loaded
    assert not gpu.held()


@pytest.fixture
def reference(bundle: Path) -> Runtime:
    return load_runtime(bundle, "reference", LoadOptions(threads=1))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.moevlm"))


def picture(width: int, height: int, seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def question(text: str, *pictures: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


TWO_IMAGES = question("and what do you see here?", picture(40, 24, 1), picture(16, 32, 2))


def answer(runtime: Runtime, messages: Any, tokens: int = 10) -> Ids:
    pieces = runtime.generate(messages, max_new_tokens=tokens, ignore_eos=True)
    return [token for piece in pieces for token in piece.token_ids]


def engine_of(runtime: Runtime) -> TensorRTEngine:
    assert isinstance(runtime.engine, TensorRTEngine)
    return runtime.engine


@pytest.mark.parametrize("messages", [question("Hi"), question("a prompt of several chunks " * 2), TWO_IMAGES])
def test_tokens_are_those_of_the_reference_engine(runtime, reference, messages) -> None:
    expected = answer(reference, messages, 16)
    assert len(set(expected)) > 3
    assert answer(runtime, messages, 16) == expected


def ragged(runtime: Runtime) -> Sequence[Any]:
    return [runtime.prompt(m) for m in (question("hi"), TWO_IMAGES, question("here: ", picture(24, 24, 3)))]


def batch(runtime: Runtime, prompts: Sequence[Any], steps: int) -> Batch:
    limits = BatchLimits.of(prompts, runtime.engine.limits, steps)
    return Batch(runtime.engine, runtime.model, prompts, runtime.encode(prompts), limits)


def test_prompts_with_images_agree_with_the_reference_step_by_step(runtime, reference) -> None:
    forced = np.random.default_rng(5).integers(7, 200, (4, 3))

    def run(one: Runtime) -> list[np.ndarray]:
        prompts = batch(one, ragged(one), 4)
        return [prompts.prefill(runtime.chunk_tokens - 4), *(prompts.decode(list(row)) for row in forced)]

    for ours, theirs in zip(run(runtime), run(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(theirs).max())


def test_more_logits_than_a_step_has_room_for(runtime, reference) -> None:
    def run(one: Runtime) -> np.ndarray:
        return batch(one, [one.prompt(TWO_IMAGES)], 0).prefill(runtime.chunk_tokens, every_position=True)

    ours, theirs = run(runtime), run(reference)
    assert len(ours) > 2 * LIMITS["max_logits"]
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(theirs).max())


def test_decode_steps_are_recorded_once_and_replayed_for_later_requests(runtime, reference, gpu) -> None:
    engine, calls = engine_of(runtime), gpu.driver.faults.calls
    assert engine.graphs == "not yet"
    first = answer(runtime, question("Hi"))
    assert (engine.graphs, calls.count("cuStreamBeginCapture")) == ("replayed", 1)
    assert gpu.driver.replays == 10 - 2  # the first token is the prompt's, the second step runs plainly
    calls.clear()
    other = answer(runtime, TWO_IMAGES)
    assert calls.count("cuStreamBeginCapture") == 0
    assert gpu.driver.replays == 8 + 9
    assert [first, other] == [answer(reference, question("Hi")), answer(reference, TWO_IMAGES)]


def test_each_page_has_its_own_recording(runtime, reference, gpu) -> None:
    def run(one: Runtime) -> list[np.ndarray]:
        prompts = batch(one, ragged(one), 8)
        return [prompts.prefill(runtime.chunk_tokens), *(prompts.decode([9 + n] * 3) for n in range(5))]

    for ours, theirs in zip(run(runtime), run(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(theirs).max())
    assert gpu.driver.faults.calls.count("cuStreamBeginCapture") == 3


def test_a_page_that_is_used_again_starts_from_zeros(runtime, gpu) -> None:
    engine = engine_of(runtime)
    first = answer(runtime, question("Hi"))
    (slot,) = engine._decoder._slots.values()
    gpu.driver.device[slot.memory.address][:] = 255  # NaN
    assert answer(runtime, question("Hi")) == first


@pytest.mark.parametrize(
    ("state", "reason"), [("record", "not permitted when stream is capturing"), ("capturable", "cannot be recorded")]
)
def test_where_recording_is_refused_steps_run_plainly_and_it_says_so(runtime, reference, gpu, state, reason) -> None:
    gpu.trt.state[state] = False
    assert answer(runtime, TWO_IMAGES) == answer(reference, TWO_IMAGES)
    assert engine_of(runtime).graphs.startswith("refused: ")
    assert reason in engine_of(runtime).graphs
    assert gpu.driver.replays == 0


def test_expert_weights_are_uploaded_once_for_all_profiles_and_pages(bundle, gpu) -> None:
    size = (bundle / EXPERTS).stat().st_size
    with load_runtime(bundle, TARGET) as runtime:
        assert 0.9 * size < gpu.driver.copied_in <= size
        weight = load_file(bundle / EXPERTS)["layers.1.feed_forward.gate_up"].tobytes()

        def copies() -> int:
            return sum(weight in memory.tobytes() for memory in gpu.driver.device.values())

        assert copies() == 1
        answer(runtime, question("Hi"))
        batch(runtime, ragged(runtime), 4).prefill(8)
        assert copies() == 1


@pytest.mark.parametrize("place", ["host:1", "host"])
def test_experts_of_chosen_layers_are_read_from_the_host_s_memory(bundle, gpu, reference, place) -> None:
    weights = load_file(bundle / EXPERTS)
    layers = sorted({int(name.split(".")[1]) for name in weights})
    expected = set(layers[-1:]) if place == "host:1" else set(layers)
    assert len(layers) > 1
    with load_runtime(bundle, TARGET, LoadOptions(experts_in=place)) as runtime:
        assert answer(runtime, TWO_IMAGES) == answer(reference, TWO_IMAGES)
        assert engine_of(runtime).graphs == "replayed"
        for name, array in weights.items():
            data, host = array.tobytes(), gpu.driver.host
            here = sum(data in memory.tobytes() for memory in gpu.driver.device.values())
            there = sum(data in host[address].tobytes() for address in gpu.driver.mapped)
            assert (here, there) == ((0, 1) if int(name.split(".")[1]) in expected else (1, 0)), name
    assert not gpu.held()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("host:9", r"experts_in = host:9 \(allowed: up to host:\d, all sparse layers\)"),
        ("host:0", "experts_in = 'host:0' .allowed: device, host, or host:N"),
        ("disk", "experts_in = 'disk' .allowed: device, host, or host:N"),
    ],
)
def test_a_place_for_experts_that_there_is_not_is_refused(bundle, place, reason) -> None:
    with pytest.raises(RequestError, match=reason):
        load_runtime(bundle, TARGET, LoadOptions(experts_in=place))


def test_a_place_for_experts_is_refused_where_it_has_no_effect(bundle, copy, gpu) -> None:
    with pytest.raises(RequestError, match="experts_in = host has no effect on reference: it is for engines on a GPU"):
        load_runtime(bundle, "reference", LoadOptions(experts_in="host"))
    edit_manifest(copy, lambda manifest: manifest["engines"][TARGET]["tensorrt"].update(experts=""))
    with pytest.raises(RequestError, match="it has its experts inside"):
        load_runtime(copy, TARGET, LoadOptions(experts_in="host"))
    assert not gpu.held()


@pytest.mark.usefixtures("gpu")
def test_weights_larger_than_the_upload_buffers_arrive_whole(bundle, reference, monkeypatch) -> None:
    monkeypatch.setattr("moevlm.runtime.backends.tensorrt.expert_memory.UPLOAD_BYTES", 1000)
    with load_runtime(bundle, TARGET) as runtime:
        assert answer(runtime, TWO_IMAGES) == answer(reference, TWO_IMAGES)


def test_threads_share_an_engine(runtime, reference) -> None:
    messages = [question("one"), TWO_IMAGES, question("three and more")]
    found: dict[int, Ids] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: answer(runtime, messages[i])})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == [answer(reference, m) for m in messages]


def vision_inputs(bundle: Path, *sizes: tuple[int, int]) -> VisionInputs:
    images = load_images(Bundle.open(bundle))
    assert images is not None
    return images.pack([images.fit(picture(*size, seed=i)["image"]) for i, size in enumerate(sizes)])[0]


def test_images_that_do_not_fit_into_one_call_are_split_between_images(bundle, runtime, reference) -> None:
    inputs = vision_inputs(bundle, (40, 24), (32, 32), (16, 16), (40, 32))
    assert inputs.image_start[-1] > LIMITS["max_patches"]
    ours, theirs = (one.engine.encode(inputs).to_host() for one in (runtime, reference))
    np.testing.assert_allclose(ours.embeds, theirs.embeds, atol=TOLERANCE * np.abs(theirs.embeds).max())
    np.testing.assert_allclose(ours.deepstack, theirs.deepstack, atol=TOLERANCE * np.abs(theirs.deepstack).max())


@pytest.mark.usefixtures("gpu")
def test_an_image_that_is_too_large_is_refused_before_the_first_piece(bundle, copy) -> None:
    edit_manifest(copy, lambda m: m["engines"][TARGET]["tensorrt"].update(max_patches=32))
    with load_runtime(copy, TARGET) as runtime:
        with pytest.raises(RequestError, match=r"image 1 has 60 patches, the engine was built for up to 32"):
            runtime.generate(TWO_IMAGES)
        with pytest.raises(EngineError, match=r"an image has 60 patches \(the engine was built for up to 32\)"):
            runtime.encode([runtime.prompt(TWO_IMAGES)])
        with pytest.raises(EngineError, match=r"image_start = .* \(allowed: rising from 0 to"):
            inputs = vision_inputs(bundle, (16, 16), (16, 16))
            runtime.engine.encode(replace(inputs, image_start=inputs.image_start[::-1]))


def test_the_runtime_keeps_within_what_the_engine_was_built_for(runtime) -> None:
    assert (runtime.chunk_tokens, runtime.context) == (LIMITS["chunk_tokens"], LIMITS["capacity"])
    with pytest.raises(RequestError, match="no room in the engine's context of 128"):
        runtime.generate(question("x" * 130))
    pieces = list(runtime.generate(question("x" * 80), ignore_eos=True))
    assert pieces[-1].usage.prompt_tokens + pieces[-1].usage.new_tokens == LIMITS["capacity"]


def test_steps_that_do_not_fit_are_refused_by_name(runtime) -> None:
    engine = engine_of(runtime)
    steps: list[Any] = []
    forward = engine.forward
    engine.forward = lambda *arguments: steps.append(arguments) or forward(*arguments)  # type: ignore[method-assign]
    batch(runtime, ragged(runtime), 0).prefill(8)
    step, visual = steps[-1]
    two = {"query_start": np.array([0, 1, step.tokens], np.int32), "context_len": np.zeros(2, np.int32)}
    two |= {"page_table": np.array([[1], [2]], np.int32), "state_row": np.ones(2, np.int32)}
    for change, reason in (
        ({"logits_index": np.array([step.tokens], np.int32)}, "logits_index"),
        ({"context_len": np.full(1, -1, np.int32)}, "context_len has -1"),
        ({"context_len": np.full(1, 127, np.int32)}, "the length of a sequence has"),
        ({"visual_index": np.full_like(step.visual_index, 10_000)}, "visual_index has 10000"),
        ({"input_ids": np.full_like(step.input_ids, -4)}, "input_ids has -4"),
        ({"page_table": np.array([[9]], np.int32)}, "page_table has 9 (allowed: 1 to 3)"),
        ({"copies": ((1, 2),)}, "copies = ((1, 2),) (allowed: none"),
        (two, "a step of 2 sequences (allowed: 1 to 1)"),
    ):
        with pytest.raises(EngineError, match=re.escape(reason)):
            forward(replace(step, **change), visual)
    with pytest.raises(EngineError, match=r"pages = 1 \(allowed: 2 or more\)"):
        engine.reserve(1, 0)
    long = batch(runtime, [runtime.prompt(question("a prompt of several chunks"))], 0)
    long._limits = replace(long._limits, tokens=100)
    with pytest.raises(EngineError, match=r"a step of 45 tokens \(allowed: 1 to 16\)"):
        long.prefill()


@pytest.mark.usefixtures("gpu")
def test_a_step_may_use_as_many_visual_rows_as_the_engine_was_built_for(copy) -> None:
    edit_manifest(copy, lambda m: m["engines"][TARGET]["tensorrt"].update(max_visual=9))
    with load_runtime(copy, TARGET) as runtime:
        assert runtime.chunk_tokens == 9  # or a step of one sequence could use more
        answer(runtime, TWO_IMAGES, 2)
        (prompts,) = [batch(runtime, [runtime.prompt(TWO_IMAGES)], 0)]
        prompts._limits = replace(prompts._limits, tokens=16)
        engine = engine_of(runtime)
        engine.limits = replace(engine.limits, max_tokens=16)
        with pytest.raises(EngineError, match=r"the step uses 1\d visual rows \(allowed: up to 9"):
            prompts.prefill()


def test_everything_is_freed_without_close_too(bundle, gpu) -> None:
    runtime = load_runtime(bundle, TARGET)
    answer(runtime, question("Hi"), 3)
    assert set(gpu.held()) >= {"device", "host", "streams", "retained", "objects"}
    del runtime
    gc.collect()
    assert not gpu.held()


def test_a_closed_engine_refuses(bundle, gpu) -> None:
    runtime = load_runtime(bundle, TARGET)
    engine = engine_of(runtime)
    prompts = batch(runtime, [runtime.prompt(question("Hi"))], 4)
    prompts.prefill(8)
    with engine:
        pass
    engine.close()
    assert not gpu.held()
    with pytest.raises(EngineError, match="this engine was closed"):
        prompts.decode([9])
    with pytest.raises(EngineError, match="this engine was closed"):
        answer(runtime, TWO_IMAGES)
    with pytest.raises(EngineError, match="this engine was closed"):
        engine.reserve(2, 0)


def test_a_new_pool_takes_the_place_of_the_old_one(bundle, gpu) -> None:
    with load_runtime(bundle, TARGET) as runtime:
        used = gpu.driver.total - gpu.driver.cuMemGetInfo.__wrapped__(gpu.driver)[0]
        batch(runtime, [runtime.prompt(question("Hi"))], 4).prefill(8)
        (slot,) = engine_of(runtime)._decoder._slots.values()
        size = len(gpu.driver.device[slot.memory.address])
        gpu.driver.total = used + 2 * size + 1000
        for _ in range(3):
            batch(runtime, [runtime.prompt(question("Hi"))], 4).prefill(8)
        with pytest.raises(EngineError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(out of memory\): .* GB wanted"):
            batch(runtime, ragged(runtime), 4).prefill(8)


def released_in(name: str) -> bool:
    return any(word in name for word in ("Free", "Destroy", "Release", "Pop"))


def scenario(bundle: Path) -> Ids:
    with load_runtime(bundle, TARGET) as runtime:
        return answer(runtime, TWO_IMAGES, 4)


def test_whatever_call_fails_everything_is_freed_and_the_error_is_one_line(bundle, tmp_path, reference) -> None:
    with fake_gpu(tmp_path) as gpu:
        expected = scenario(bundle)
        calls = list(gpu.driver.faults.calls)
    assert expected == answer(reference, TWO_IMAGES, 4)
    failing = {(name, count) for name in set(calls) for count in (0, calls.count(name) // 2, calls.count(name) - 1)}
    # Where a context cannot be entered any more, nothing in it can be freed.
    failing.remove(("cuCtxPushCurrent", calls.count("cuCtxPushCurrent") - 1))
    gc.freeze()  # what other tests have loaded need not be looked through each time
    survived = set()
    for number, fault in enumerate(sorted(failing)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with fake_gpu(folder) as gpu:
            gpu.driver.faults.fail = fault
            try:
                assert scenario(bundle) == expected
                survived.add(fault[0])
            except MoevlmError as error:
                assert fault[0].startswith("cu") <= (fault[0] in str(error) or "no NVIDIA" in str(error)), fault
                assert "\n" not in str(error)
            except RuntimeError as error:
                assert fault[0] == "Runtime", error
            gc.collect()
            assert not gpu.held(), fault
    gc.unfreeze()
    # What is lost: a recording, and kernels for the next start.
    assert survived == {
        *("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy", "is_stream_capturable"),
        *("execute_async_v3", "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "set_runtime_cache", "serialize"),
    }


def test_without_a_device_nothing_of_tensorrt_is_made(bundle, tmp_path) -> None:
    with fake_gpu(tmp_path, devices=0) as gpu:
        with pytest.raises(BundleError, match=r"no engine for this machine in .*this machine has no NVIDIA GPU"):
            load_engine(Bundle.open(bundle), TARGET)
        opened = Bundle.open(bundle)
        metadata = opened.manifest.engines[TARGET]
        with pytest.raises(EngineError, match="no NVIDIA GPU that this process may use"):
            TensorRTEngine(None, None, bundle / EXPERTS, opened.manifest.model, metadata)  # type: ignore[arg-type]
        assert "logger" not in gpu.trt.state
        assert not gpu.trt.state["libraries"]


@pytest.mark.parametrize("which", ["decoder", "vision", "experts"])
def test_a_changed_byte_is_refused_before_anything_is_deserialised(copy, gpu, which) -> None:
    engine = Bundle.open(copy).manifest.engines[TARGET]
    name = engine.tensorrt.experts if which == "experts" else getattr(engine, which)  # type: ignore[union-attr]
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{re.escape(name)} is damaged or was changed"):
        load_engine(Bundle.open(copy), TARGET)
    assert gpu.trt.state["deserialized"] == 0
    assert not gpu.held()


def test_what_tensorrt_refuses_is_an_error_with_its_reason(copy, gpu) -> None:
    name = Bundle.open(copy).manifest.engines[TARGET].decoder
    (copy / name).write_bytes(b"nonsense" * 20)
    rehash(copy, name)
    with pytest.raises(EngineError, match=rf"tensorrt_rtx 1.7.1.116 could not load {name}: this is no plan In some"):
        load_engine(Bundle.open(copy), TARGET)
    assert not gpu.held()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("tensorrt.capacity", 64, "key_cache.0 FLOAT (-1, 2, 128, 16), manifest.json says FLOAT"),
        ("tensorrt.activations", "bfloat16", "manifest.json says BF16"),
        ("tensorrt.activations", "int8", "unsupported value activations = 'int8'"),
        ("tensorrt.max_batch", 4, "takes input_ids up to (3, 16), manifest.json says (4, 16)"),
        ("tensorrt.max_logits", 6, "takes logits_index up to (5,)"),
        ("tensorrt.max_visual", 25, "takes visual_embeds up to (24, 32)"),
        ("model.hidden", 31, "has hidden = 32, manifest.json says 31"),
        ("model.vocabulary", 9, "has vocabulary = 263, manifest.json says 9"),
        ("states", [], "has an input key_cache.0"),
        ("states.0.kv_heads", 1, "manifest.json says FLOAT (-1, 1, 128, 16)"),
        ("model.vision.deepstack", 1, "has deepstack = 2, manifest.json says 1"),
    ],
)
def test_a_plan_that_is_not_what_the_manifest_says_is_refused(copy, gpu, field: str, value: Any, reason: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        *path, last = field.split(".")
        place: Any = manifest if path[:1] == ["model"] else manifest["engines"][TARGET]
        for key in path:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value

    edit_manifest(copy, change)
    with pytest.raises(EngineError, match=re.escape(reason)):
        load_engine(Bundle.open(copy), TARGET)
    assert not gpu.held()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("layers.0.feed_forward.down"), "has an input layers.0.feed_forward.down, which experts"),
        (lambda t: t.update({"layers.0.feed_forward.down": np.zeros(3, np.float32)}), "takes 24576 bytes for layers.0"),
    ],
)
def test_expert_weights_that_do_not_fit_the_plan_are_refused(copy, gpu, change, reason) -> None:
    tensors = load_file(copy / EXPERTS)
    change(tensors)
    save_file(tensors, copy / EXPERTS)
    rehash(copy, EXPERTS)
    with pytest.raises(EngineError, match=reason):
        load_engine(Bundle.open(copy), TARGET)
    assert not gpu.held()


def test_compiled_kernels_are_kept_for_the_next_process(bundle, gpu, tmp_path) -> None:
    def load() -> list[str]:
        gpu.trt.state["compiled"].clear()
        with load_runtime(bundle, TARGET) as runtime:
            answer(runtime, question("Hi"), 3)
        return list(gpu.trt.state["compiled"])

    everything = ["decoder.onnx 0", "vision.onnx 0", "decoder.onnx 1"]
    assert load() == everything
    assert load() == []
    (file,) = (tmp_path / "cache").rglob("*.bin")
    assert file.stat().st_mode & 0o077 == 0
    file.write_bytes(file.read_bytes()[:-1])
    assert load() == everything
    assert load() == []
    file.parent.chmod(0o777)  # where others may write, nothing is taken from
    assert load() == everything
    file.parent.chmod(0o700)
    gpu.driver.sm = (8, 6)
    assert load() == everything
    assert len(list(file.parent.iterdir())) == 2


def test_plugins_are_loaded_once_and_only_from_the_package(bundle, gpu, tmp_path) -> None:
    for _ in range(2):
        load_engine(Bundle.open(bundle), TARGET).close()
    assert gpu.trt.state["libraries"] == [str(tmp_path / "tensorrt_plugin.so")]
