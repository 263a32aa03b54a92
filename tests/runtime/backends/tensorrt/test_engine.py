"""The engine on TensorRT, on a fake GPU that evaluates the canonical graphs: what it computes, keeps and gives back."""

from __future__ import annotations

import gc
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from moevlm.export.build import build
from moevlm.export.families import base as families
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.runtime.backends.tensorrt.engine import EngineFiles, TensorRTEngine
from moevlm.runtime.backends.tensorrt.memory_budget import reserved
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, EngineError, MoevlmError, RequestError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.step import Step
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures, joined
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_engine, load_images, load_runtime
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.bundles import edit_manifest, rehash
from tests.support.fakes.gpu import EXPERTS, LIMITS, TARGET, FakeGpu, fake_gpu, gpu_bundle
from tests.support.hybrid import save
from tests.support.hybrid.family import Hybrid

TOLERANCE = 1e-5
SIZES = (1, 2, 4, 5)  # of decode steps, for up to 5 sequences
Ids = list[int]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_bundle(tiny_bundle, tmp_path_factory.mktemp("gpu"))


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


def assert_close(ours: HostFeatures, theirs: HostFeatures) -> None:
    for mine, other in ((ours.embeds, theirs.embeds), (ours.deepstack, theirs.deepstack)):
        np.testing.assert_allclose(mine, other, atol=TOLERANCE * np.abs(other).max())


def forwarded(runtime: Runtime) -> list[Step]:
    """Steps of the engine from now on."""
    steps: list[Step] = []
    forward = runtime.engine.forward
    runtime.engine.forward = lambda step, *more: steps.append(step) or forward(step, *more)
    return steps


def engine_of(runtime: Runtime) -> TensorRTEngine:
    assert isinstance(runtime.engine, TensorRTEngine)
    return runtime.engine


@pytest.mark.parametrize("messages", [question("Hi"), question("a prompt of several chunks " * 2), TWO_IMAGES])
def test_tokens_are_those_of_the_reference_engine(runtime, reference, messages) -> None:
    expected = answer(reference, messages, 16)
    assert len(set(expected)) > 3
    assert answer(runtime, messages, 16) == expected


@pytest.fixture(scope="module")
def bundle_of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with a layer in which an image's tokens see each other, and latent ones, which scale queries."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families._REGISTRY, "hybrid_test", Hybrid)
        build(save(folder / "checkpoint", ("wide", "images", "latent")), folder / "images.moevlm", ("reference",))
    return gpu_bundle(folder / "images.moevlm", folder)


def test_image_tokens_see_each_other_as_in_the_reference_engine(bundle_of_images: Path, gpu: FakeGpu) -> None:
    seen = question("what is here?", picture(24, 16, 1))
    expected = answer(load_runtime(bundle_of_images, "reference", LoadOptions(threads=1)), seen, 16)
    with load_runtime(bundle_of_images, TARGET) as runtime:
        steps = forwarded(runtime)
        assert answer(runtime, seen, 16) == expected
    assert any((step.visible_end > step.context_len[0] + np.arange(step.tokens) + 1).any() for step in steps)
    assert len({float(step.query_scale[-1]) for step in steps}) > 2
    assert not gpu.held()


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


def test_requests_at_the_same_time_share_steps_and_get_their_own_tokens(runtime, reference) -> None:
    messages = [question("Hi"), TWO_IMAGES, question("three and more"), question("a longer prompt " * 3)]
    messages += [question("seen: ", picture(24, 24, 3)), question("six"), question("seven")]
    found = runtime.generate_many(messages, max_new_tokens=9, ignore_eos=True)
    expected = reference.generate_many(messages, max_new_tokens=9, ignore_eos=True)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_each_size_of_decode_steps_is_recorded_before_the_first_request(bundle, gpu, reference) -> None:
    with load_runtime(bundle, TARGET) as runtime:
        engine, calls = engine_of(runtime), gpu.driver.faults.calls
        assert (engine.graphs, calls.count("cuStreamBeginCapture")) == ("replayed", len(SIZES))
        gpu.trt.state["compiled"].clear()
        calls.clear()
        assert answer(runtime, question("Hi")) == answer(reference, question("Hi"))
        assert gpu.driver.replays == 10 - 1  # the first token is the prompt's
        runtime.generate_many([question("one"), question("two"), question("three")], max_new_tokens=4, ignore_eos=True)
        assert "cuStreamBeginCapture" not in calls
        assert gpu.trt.state["compiled"] == []


def test_decode_steps_of_any_number_of_sequences_are_padded_to_the_next_size(runtime, reference, gpu) -> None:
    def run(one: Runtime, count: int) -> list[np.ndarray]:
        prompts = batch(one, [one.prompt(question("x" * n)) for n in range(1, count + 1)], 4)
        prompts.prefill(6)
        return [prompts.decode([9 + n] * count) for n in range(2)]

    for count in range(1, LIMITS["max_sequences"] + 1):
        theirs, before = run(reference, count), gpu.driver.replays
        ours = run(runtime, count)
        assert gpu.driver.replays == before + 2
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, atol=TOLERANCE * np.abs(other).max())


@pytest.mark.parametrize("wanted", [[2, 0], [1], [0, 1, 2, 2, 1], []], ids=str)
def test_rows_of_a_decode_step_are_those_that_were_asked_for(runtime, wanted) -> None:
    prompts = batch(runtime, [runtime.prompt(question(text)) for text in ("a", "bb", "ccc")], 4)
    prompts.prefill(6)
    steps = forwarded(runtime)
    prompts.decode([9, 10, 11])
    (step,) = steps  # which may run again: it writes the same
    whole = runtime.engine.forward(step)
    rows = [whole.logits(n) for n in range(3)]
    some = runtime.engine.forward(replace(step, logits_index=np.array(wanted, np.int32)))
    assert some.candidates.ids.tolist() == [whole.candidates.ids[n].tolist() for n in wanted]
    for place, n in enumerate(wanted):
        np.testing.assert_allclose(some.logits(place), rows[n], atol=TOLERANCE * np.abs(rows[n]).max())


def test_what_begins_alike_is_computed_once_and_its_last_page_copied(runtime, reference, gpu) -> None:
    text = "a beginning that is longer than a page of the cache, which has room for sixty-four tokens: "
    expected = [answer(reference, question(text + end)) for end in ("one", "two")]
    assert answer(runtime, question(text + "one")) == expected[0]
    copies = gpu.driver.faults.calls.count("cuMemcpyDtoDAsync"), len(gpu.driver.copied_rows)
    steps = forwarded(runtime)
    assert answer(runtime, question(text + "two")) == expected[1]
    assert steps[0].tokens < 40 < steps[0].context_len[0]
    ((source, target),) = steps[0].copies
    assert source != target
    assert gpu.driver.faults.calls.count("cuMemcpyDtoDAsync") == copies[0]
    rows = gpu.driver.copied_rows[copies[1] :]
    assert [one for one in rows if one.on_device] == [rows[0]]  # all layers' keys and values at once
    assert (rows[0].width, rows[0].rows) == (2 * 64 * 16 * 4, 4)


def test_of_page_tables_the_columns_that_are_used_are_copied(runtime, gpu) -> None:
    answer(runtime, question("x" * 150), 3)
    mixed, decode = gpu.driver.copied_rows[-3], gpu.driver.copied_rows[-1]
    columns = runtime.context // 64
    assert (mixed.pitch, decode.pitch) == (4 * columns, 4 * columns)
    assert (decode.width, decode.rows) == (4 * 8, 1)  # tables grow by 8 columns


def test_a_row_of_logits_stays_on_the_device_until_it_is_asked_for(runtime, gpu) -> None:
    engine, steps = engine_of(runtime), forwarded(runtime)
    answer(runtime, question("Hi"), 2)
    copies = gpu.driver.copied_out
    output = engine.forward(steps[-1])
    small = gpu.driver.copied_out - copies
    row = output.logits(0)
    assert (row.shape, row.dtype) == ((runtime.model.vocabulary,), np.float32)
    assert gpu.driver.copied_out - copies - small == row.nbytes
    best = int(output.candidates.ids[0, 0])
    assert (int(row.argmax()), row[best]) == (best, output.candidates.values[0, 0])
    with pytest.raises(EngineError, match=r"row 1 of logits \(allowed: 0 to 0\)"):
        output.logits(1)
    engine.forward(steps[-1])
    with pytest.raises(EngineError, match="logits of an earlier step: another one ran since"):
        output.logits(0)


@pytest.mark.parametrize(
    ("state", "reason"), [("record", "not permitted when stream is capturing"), ("capturable", "cannot be recorded")]
)
def test_where_recording_is_refused_steps_run_plainly_and_it_says_so(bundle, gpu, reference, state, reason) -> None:
    gpu.trt.state[state] = False
    with load_runtime(bundle, TARGET) as runtime:
        assert answer(runtime, TWO_IMAGES) == answer(reference, TWO_IMAGES)
        assert engine_of(runtime).graphs.startswith("refused: ")
        assert reason in engine_of(runtime).graphs
    assert gpu.driver.replays == 0


def test_expert_weights_are_uploaded_once_for_all_profiles_and_pages(bundle, gpu) -> None:
    size = (bundle / EXPERTS).stat().st_size
    with load_runtime(bundle, TARGET) as runtime:
        assert 0.9 * size < gpu.driver.copied_in < 1.5 * size
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
        ("host:9", r"experts_in = 'host:9' \(allowed: up to host:\d, all sparse layers\)"),
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
    return images.pack([images.fit(picture(*size, seed=i)["image"])[0] for i, size in enumerate(sizes)])[0]


def test_images_that_do_not_fit_into_one_call_are_split_between_images(bundle, runtime, reference) -> None:
    inputs = vision_inputs(bundle, (40, 24), (32, 32), (16, 16), (40, 32))
    assert inputs.image_start[-1] > LIMITS["max_patches"]
    assert_close(*(one.engine.encode(inputs).to_host() for one in (runtime, reference)))


@pytest.mark.usefixtures("gpu")
def test_an_image_that_is_too_large_is_refused_before_the_first_piece(bundle, copy) -> None:
    edit_manifest(copy, lambda m: m["engines"][TARGET]["tensorrt"].update(max_patches=32))
    with load_runtime(copy, TARGET) as runtime:
        with pytest.raises(RequestError, match=r"image 1 needs 60 patches at once, the engine was built for up to 32"):
            runtime.generate(TWO_IMAGES)
        with pytest.raises(EngineError, match=r"an image has 60 patches \(the engine was built for up to 32\)"):
            runtime.encode([runtime.prompt(TWO_IMAGES)])
        with pytest.raises(EngineError, match=r"image_start = .* \(allowed: rising from 0 to"):
            inputs = vision_inputs(bundle, (16, 16), (16, 16))
            runtime.engine.encode(replace(inputs, image_start=inputs.image_start[::-1]))


def test_features_that_are_not_as_many_as_the_manifest_says_are_refused(bundle, copy, gpu) -> None:
    edit_manifest(copy, lambda manifest: manifest["model"]["vision"].update(merge_size=1))
    engine = load_engine(Bundle.open(copy), TARGET)
    with pytest.raises(EngineError, match=r"gives visual_embeds of shape \(4, 32\) \(expected: \(16, 32\)\)"):
        engine.encode(vision_inputs(bundle, (16, 16)))
    engine.close()
    assert not gpu.held()


def test_the_runtime_keeps_within_what_the_engine_was_built_for(copy, gpu) -> None:
    edit_manifest(copy, lambda m: m["engines"][TARGET]["tensorrt"].update(max_pages=3))
    with load_runtime(copy, TARGET) as runtime:
        most = LIMITS["max_tokens"] - LIMITS["max_sequences"]
        assert (runtime.chunk_tokens, runtime.context) == (most, 2 * 64)
        with pytest.raises(RequestError, match="no room in the engine's context of 128"):
            runtime.generate(question("x" * 130))
        pieces = list(runtime.generate(question("x" * 80), ignore_eos=True))
        assert pieces[-1].usage.prompt_tokens + pieces[-1].usage.new_tokens == 128
        with pytest.raises(EngineError, match=r"pages = 4 \(allowed: up to 3\)"):
            runtime.engine.reserve(4, 0)
    assert not gpu.held()


def test_steps_that_do_not_fit_are_refused_by_name(runtime) -> None:
    engine, steps = engine_of(runtime), forwarded(runtime)
    first, second = runtime.encode([runtime.prompt(TWO_IMAGES)])
    batch(runtime, ragged(runtime), 0).prefill(7)
    step = next(step for step in steps if (step.visual_index >= 0).any())
    seen, tokens = [FeatureRows.all_of(first)], step.tokens
    engine.forward(step, seen)
    table = np.array(step.page_table)
    table[1, 0] = 9
    many = {"query_start": np.arange(tokens + 1, dtype=np.int32), "context_len": np.zeros(tokens, np.int32)}
    many |= {"page_table": np.ones((tokens, 1), np.int32), "state_row": np.ones(tokens, np.int32)}
    for change, reason in (
        ({"logits_index": np.array([tokens], np.int32)}, "logits_index"),
        ({"logits_index": np.zeros(7, np.int32)}, "a step of 7 rows of logits (allowed: 0 to 6)"),
        ({"context_len": np.full_like(step.context_len, -1)}, "context_len has -1"),
        ({"context_len": np.full_like(step.context_len, 511)}, "the length of a sequence has"),
        ({"visual_index": np.full_like(step.visual_index, 10_000)}, "visual_index has 10000"),
        ({"input_ids": np.full_like(step.input_ids, -4)}, "input_ids has -4"),
        ({"page_table": table}, "page_table has 9 (allowed: 1 to 4)"),
        ({"page_table": table[:, :0]}, "page_table has 0 pages for 14 tokens (allowed: 1 or more)"),
        ({"copies": ((1, 5),)}, "copies has 5 (allowed: 1 to 4)"),
        (many, f"a step of {tokens} sequences (allowed: 1 to 5)"),
    ):
        with pytest.raises(EngineError, match=re.escape(reason)):
            engine.forward(replace(step, **change), seen)
    with pytest.raises(EngineError, match=r"a step of 23 visual rows \(allowed: up to 21\)"):
        engine.forward(step, [*seen, FeatureRows.all_of(second)])
    with pytest.raises(EngineError, match=r"visual features 3 to 99 \(allowed: of 0 to 15\)"):
        engine.forward(step, [FeatureRows(first, 3, 99)])
    with pytest.raises(EngineError, match=r"pages = 1 \(allowed: 2 or more\)"):
        engine.reserve(1, 0)
    long = batch(runtime, [runtime.prompt(question("a prompt of several chunks"))], 0)
    long._limits = replace(long._limits, tokens=100)
    with pytest.raises(EngineError, match=r"a step of 45 tokens \(allowed: 1 to 21\)"):
        long.prefill()


@pytest.mark.usefixtures("gpu")
def test_an_engine_may_have_fewer_rows_of_logits_than_sequences(copy, reference) -> None:
    edit_manifest(copy, lambda m: m["engines"][TARGET]["tensorrt"].update(max_logits=2))
    messages = [question(text) for text in ("one", "two", "three", "four")]
    with load_runtime(copy, TARGET) as runtime:
        steps = forwarded(runtime)
        found = runtime.generate_many(messages, max_new_tokens=4, ignore_eos=True)
        assert max(len(step.logits_index) for step in steps) == 2
    expected = reference.generate_many(messages, max_new_tokens=4, ignore_eos=True)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


@pytest.mark.usefixtures("gpu")
def test_a_chunk_has_no_more_tokens_than_visual_rows_fit_into_a_step(copy, reference) -> None:
    edit_manifest(copy, lambda m: m["engines"][TARGET]["tensorrt"].update(max_visual=9))
    with load_runtime(copy, TARGET) as runtime:
        steps = forwarded(runtime)
        assert answer(runtime, TWO_IMAGES, 2) == answer(reference, TWO_IMAGES, 2)
        assert max(step.tokens for step in steps) == 9


def test_features_of_images_never_leave_the_device(runtime, reference, gpu) -> None:
    candidates = 4 * (2 * min(256, runtime.model.vocabulary) + 1)
    before, steps = gpu.driver.copied_out, forwarded(runtime)
    assert answer(runtime, TWO_IMAGES, 5) == answer(reference, TWO_IMAGES, 5)
    assert gpu.driver.copied_out - before < len(steps) * (candidates + 1024)
    ours, theirs = (one.encode([one.prompt(TWO_IMAGES)]) for one in (runtime, reference))
    assert [one.rows for one in ours] == [one.rows for one in theirs] == [15, 8]
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine.to_host(), other.to_host())


def test_features_are_freed_with_their_last_handle_in_any_thread(bundle, runtime, gpu) -> None:
    engine, images = engine_of(runtime), runtime.prompt(TWO_IMAGES).images
    runtime.encode([runtime.prompt(TWO_IMAGES)])
    held = len(gpu.driver.device)
    together = engine.encode(load_images(Bundle.open(bundle)).pack(images)[0])
    assert (len(gpu.driver.device), together.nbytes) == (held + 1, len(next(reversed(gpu.driver.device.values()))))
    first, second = together.split([15, 8])
    values = together.to_host()
    del together
    assert len(gpu.driver.device) == held + 2
    assert_close(joined([FeatureRows.all_of(one) for one in (first, second)]), values)
    dropped = [first]
    del first
    thread = threading.Thread(target=dropped.clear)
    thread.start()
    thread.join()
    assert len(gpu.driver.device) == held + 1
    engine.close()
    assert not gpu.held()
    with pytest.raises(EngineError, match="the engine of these visual features was closed"):
        second.to_host()
    with pytest.raises(EngineError, match="the engine of these visual features was closed"):
        second.split([4, 4])
    del second
    assert not gpu.held()


def test_features_of_another_engine_are_refused(runtime, reference) -> None:
    steps = forwarded(runtime)
    answer(runtime, TWO_IMAGES, 1)
    step = next(step for step in steps if (step.visual_index >= 0).any())
    with pytest.raises(EngineError, match="visual features of another engine"):
        runtime.engine.forward(step, [FeatureRows.all_of(reference.encode([reference.prompt(TWO_IMAGES)])[0])])


def test_pages_take_the_memory_that_is_free_once_the_engine_has_run(copy, gpu) -> None:
    page = 2 * 2 * 64 * 2 * 16 * 4
    with load_runtime(copy, TARGET) as runtime:
        engine = engine_of(runtime)
        assert engine.limits.cache_memory == LIMITS["max_pages"] * page  # the engine takes no more
        used = gpu.driver.total - gpu.driver.cuMemGetInfo.__wrapped__(gpu.driver)[0]
        fixed = used - LIMITS["max_pages"] * page + reserved(images=True) + engine._vision.call_bytes
    gpu.driver.total = fixed + 5 * page + 1000
    with load_runtime(copy, TARGET) as runtime:
        assert 4 * page < engine_of(runtime).limits.cache_memory < 6 * page
        assert runtime.context == 4 * 64
    with load_runtime(copy, TARGET, LoadOptions(cache_memory=3 * page)) as runtime:
        assert runtime.context == 2 * 64
    most = rf"unsupported value cache_memory = {9 * page} \(allowed: up to \d+ bytes, the memory that the engine leaves"
    with pytest.raises(RequestError, match=most):
        load_runtime(copy, TARGET, LoadOptions(cache_memory=9 * page))
    gc.collect()
    assert not gpu.held()
    gpu.driver.total = fixed
    with pytest.raises(EngineError, match=r"too little memory on Fake GPU: .* GB are free .*, .* GB are needed"):
        load_runtime(copy, TARGET)
    assert not gpu.held()


def test_preparing_steps_is_told(bundle, gpu) -> None:
    told: list[tuple[str, int, int]] = []
    with load_runtime(bundle, TARGET, progress=lambda *stage: told.append(stage)):
        assert [stage for stage in told if stage[0] == "preparing steps"] == [
            ("preparing steps", done, 1 + len(SIZES)) for done in range(2 + len(SIZES))
        ]
    assert not gpu.held()


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
        batch(runtime, [runtime.prompt(question("Hi"))], 4).prefill(8)
        held, calls = len(gpu.driver.device), gpu.driver.faults.calls
        gpu.driver.total = gpu.driver.total - gpu.driver.cuMemGetInfo.__wrapped__(gpu.driver)[0] + 70_000
        calls.clear()
        for _ in range(3):
            batch(runtime, [runtime.prompt(question("Hi"))], 4).prefill(8)
        assert len(gpu.driver.device) == held
        assert "cuStreamBeginCapture" not in calls  # pages of the same number stay where they are
        with pytest.raises(
            EngineError, match=r"no memory for 9 pages of 64 tokens: .*MEMORY .out of memory.: .* wanted"
        ):
            runtime.engine.reserve(9, 0)
        with pytest.raises(EngineError, match="a step before any page was reserved"):
            answer(runtime, question("Hi"))


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
        *("set_runtime_cache", "serialize"),
    }


def test_without_a_device_nothing_of_tensorrt_is_made(bundle, tmp_path) -> None:
    with fake_gpu(tmp_path, devices=0) as gpu:
        with pytest.raises(BundleError, match=r"no engine for this machine in .*this machine has no NVIDIA GPU"):
            load_engine(Bundle.open(bundle), TARGET)
        opened = Bundle.open(bundle)
        metadata = opened.manifest.engines[TARGET]
        with pytest.raises(EngineError, match="no NVIDIA GPU that this process may use"):
            TensorRTEngine(EngineFiles(None, None, None), opened.manifest.model, metadata)
        assert "logger" not in gpu.trt.state
        assert not gpu.trt.state["libraries"]


@pytest.mark.parametrize("which", ["decoder", "vision", "experts"])
def test_a_changed_byte_is_refused_before_anything_is_deserialised(copy, gpu, which) -> None:
    engine = Bundle.open(copy).manifest.engines[TARGET]
    name = engine.tensorrt.experts if which == "experts" else getattr(engine, which)
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
        ("tensorrt.activations", "bfloat16", "has visual_embeds in = FLOAT, manifest.json says BF16"),
        ("tensorrt.activations", "int8", "unsupported value activations = 'int8'"),
        ("tensorrt.max_sequences", 6, "takes input_ids up to 5, manifest.json says 6"),
        ("tensorrt.max_tokens", 22, "takes input_ids up to 21, manifest.json says 22"),
        ("tensorrt.max_logits", 7, "takes logits_index up to 6"),
        ("tensorrt.max_visual", 25, "takes visual_embeds up to 24"),
        ("model.hidden", 31, "has hidden = 32, manifest.json says 31"),
        ("model.vocabulary", 9, "has vocabulary = 263, manifest.json says 9"),
        ("states", [], "has an input key_cache.0"),
        ("states.0.kv_heads", 1, "key_cache.0 FLOAT (-1, 2, 64, 16), manifest.json says FLOAT (-1, 1, 64, 16)"),
        ("states.0.dtype", "int8", "key_cache.0 FLOAT (-1, 2, 64, 16), manifest.json says INT8 (-1, 2, 64, 20)"),
        ("page_size", 32, "manifest.json says FLOAT (-1, 2, 32, 16)"),
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

    everything = ["decoder.onnx 0", "decoder.onnx 1", "vision.onnx 0"]
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
