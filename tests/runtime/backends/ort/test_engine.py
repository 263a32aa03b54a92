"""The engine on ONNX Runtime: what it computes, where it keeps its caches, and what it refuses."""

import gc
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import EngineError, MoevlmError
from moevlm.runtime.core.states import PagedKV
from moevlm.runtime.engine.protocol import Step, VisionInputs, VisualFeatures
from moevlm.runtime.loading import load_runtime, open_graphs
from moevlm.runtime.request.positions import rope_tables
from moevlm.runtime.request.vision_inputs import pack_grids
from tests.support.bundles import copy_bundle, rehash

ENGINES = ("reference", "ort-cpu")
# Rows of a batch may meet other kernels than a row alone.
TOLERANCE = 1e-5


def load(bundle: Path, target: str, tapped: bytes | None = None) -> OrtEngine:
    opened = Bundle.open(bundle)
    vision, decoder = open_graphs(opened, target)
    decoder = decoder if tapped is None else replace(decoder, data=tapped)
    return OrtEngine(vision, decoder, opened.manifest.model, opened.engine(target)[1], threads=1)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[OrtEngine]:
    return load(tiny_bundle, request.param)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path):
    return Bundle.open(tiny_bundle).manifest.model


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def text_step(model, ids: list[list[int]], position: list[int]) -> Step:
    """Text only; logits of every position."""
    tokens = np.array(ids)
    place = np.array(position)[:, None] + np.arange(tokens.shape[1])
    cos, sin = rope_tables(np.broadcast_to(place, (3, *place.shape)), model.ropes[0])
    return Step(tokens, np.full_like(tokens, -1), cos, sin, np.array(position), np.arange(tokens.size))


def features(model, rows: int, rng: np.random.Generator) -> VisualFeatures:
    shape = (model.vision.deepstack, rows, model.hidden)
    return VisualFeatures(rng.standard_normal(shape[1:], np.float32), rng.standard_normal(shape, np.float32))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def test_text_without_images_does_not_depend_on_visual_features(engine, model, rng) -> None:
    step = text_step(model, [[9, 20, 30]], [0])
    alone = engine.forward(step, None, engine.new_cache(1, 8))
    beside_images = engine.forward(step, features(model, 5, rng), engine.new_cache(1, 8))
    assert alone.shape == (3, model.vocabulary)
    assert alone.dtype == np.float32
    np.testing.assert_array_equal(alone, beside_images)


def test_visual_rows_stand_in_for_tokens_and_reach_the_first_layers(engine, model, rng) -> None:
    step = text_step(model, [[9, 20, 30]], [0])
    step = replace(step, visual_index=np.array([[-1, 4, -1]]))
    seen = features(model, 5, rng)

    def logits(visual: VisualFeatures) -> np.ndarray:
        return engine.forward(step, visual, engine.new_cache(1, 8))

    base = logits(seen)
    other_rows = replace(seen, embeds=seen.embeds.copy(), deepstack=seen.deepstack.copy())
    other_rows.embeds[:4], other_rows.deepstack[:, :4] = 7, 7
    np.testing.assert_array_equal(logits(other_rows), base)
    assert not np.allclose(logits(replace(seen, embeds=-seen.embeds)), base)
    for level in range(model.vision.deepstack):
        deepstack = seen.deepstack.copy()
        deepstack[level, 4] *= -1
        assert not np.allclose(logits(replace(seen, deepstack=deepstack)), base)
    np.testing.assert_array_equal(base[0], engine.forward(step, seen, engine.new_cache(1, 8))[0])


def test_batch_of_two_equals_two_single_sequences(engine, model) -> None:
    rows = [[9, 20, 30, 40], [50, 60, 70, 80]]
    together = engine.forward(text_step(model, rows, [0, 0]), None, engine.new_cache(2, 8))
    alone = [engine.forward(text_step(model, [row], [0]), None, engine.new_cache(1, 8)) for row in rows]
    assert_close(together, np.concatenate(alone))
    assert not np.allclose(alone[0], alone[1])


def test_one_pass_equals_steps_of_any_size(engine, model) -> None:
    ids = [9, 20, 30, 40, 50, 60]
    expected = engine.forward(text_step(model, [ids], [0]), None, engine.new_cache(1, 6))
    for sizes in ([1] * 6, [4, 2], [1, 5]):
        cache, got, done = engine.new_cache(1, 6), [], 0
        for size in sizes:
            got.append(engine.forward(text_step(model, [ids[done : done + size]], [done]), None, cache))
            done += size
        assert_close(np.concatenate(got), expected)


def test_only_the_logits_asked_for_are_returned_in_order(engine, model) -> None:
    step = text_step(model, [[9, 20, 30], [40, 50, 60]], [0, 0])
    every = engine.forward(step, None, engine.new_cache(2, 8))
    some = engine.forward(replace(step, logits_index=np.array([4, 0])), None, engine.new_cache(2, 8))
    assert_close(some, every[[4, 0]])


def test_logits_of_a_step_survive_the_next_step(engine, model) -> None:
    cache = engine.new_cache(1, 8)
    first = engine.forward(text_step(model, [[9, 20]], [0]), None, cache)
    kept = first.copy()
    engine.forward(text_step(model, [[30, 40]], [2]), None, cache)
    np.testing.assert_array_equal(first, kept)


def test_caches_of_one_engine_are_independent(engine, model) -> None:
    one, other = engine.new_cache(1, 8), engine.new_cache(1, 8)
    engine.forward(text_step(model, [[9, 20]], [0]), None, one)
    engine.forward(text_step(model, [[70, 80]], [0]), None, other)
    after_one = engine.forward(text_step(model, [[30]], [2]), None, one)
    fresh = engine.new_cache(1, 8)
    assert_close(after_one, engine.forward(text_step(model, [[9, 20, 30]], [0]), None, fresh)[2:])


def test_cache_buffers_stay_where_they_are(engine, model) -> None:
    cache = engine.new_cache(1, 8)

    def addresses() -> list[int]:
        return [value.data_ptr() for value in cache.binding.get_outputs()[1:]]

    engine.forward(text_step(model, [[9, 20]], [0]), None, cache)
    before = addresses()
    assert len(set(before)) == 2 * len(model.layers)
    for position in range(2, 8):
        engine.forward(text_step(model, [[9]], [position]), None, cache)
    assert addresses() == before


def test_two_images_of_different_size_equal_two_single_calls(engine, model, rng) -> None:
    vision = model.vision
    width = vision.channels * vision.temporal_patch_size * vision.patch_size**2
    grids = [(4, 2), (2, 6)]
    patches = [rng.standard_normal((h * w, width), np.float32) for h, w in grids]
    together = engine.encode(VisionInputs(np.concatenate(patches), *pack_grids(grids, vision)))
    alone = [
        engine.encode(VisionInputs(p, *pack_grids([grid], vision))) for p, grid in zip(patches, grids, strict=True)
    ]
    assert_close(together.embeds, np.concatenate([a.embeds for a in alone]))
    assert_close(together.deepstack, np.concatenate([a.deepstack for a in alone], axis=1))
    assert together.deepstack.shape == (vision.deepstack, 5, model.hidden)


@pytest.mark.parametrize("target", ENGINES)
def test_taps_come_with_the_logits_and_change_nothing(target: str, tiny_bundle: Path, model) -> None:
    graph = onnx.load(tiny_bundle / Bundle.open(tiny_bundle).engine(target)[1].decoder, load_external_data=False)
    names = ["layers.1.hidden", "layers.0.router_logits"]
    for name in names:
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]))
    tapped, plain = load(tiny_bundle, target, graph.SerializeToString()), load(tiny_bundle, target)
    cache = tapped.new_cache(2, 8)
    values = tapped.run(text_step(model, [[9, 20], [30, 40]], [0, 0]), None, cache)
    assert list(values) == ["logits", *names]
    assert values["layers.1.hidden"].shape == (4, model.hidden)
    assert values["layers.0.router_logits"].shape == (4, model.layers[0].experts)
    step = text_step(model, [[50, 60, 70], [80, 90, 99]], [2, 2])
    assert tapped.run(step, None, cache)["layers.1.hidden"].shape == (6, model.hidden)
    first = text_step(model, [[9, 20], [30, 40]], [0, 0])
    assert_close(values["logits"], plain.forward(first, None, plain.new_cache(2, 8)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cache_position": np.array([3, 6])}, "3 tokens at position 6 do not fit into a cache of 8"),
        ({"visual_index": np.array([[-1, 0, -1]] * 2)}, "visual_index = 0, but the step has 0 visual features"),
        ({"logits_index": np.array([99])}, "the decoder graph failed: "),
        ({"input_ids": np.array([[9, 1 << 40, 9]] * 2)}, "input_ids has 1099511627776 (allowed: 0 to "),
        ({"input_ids": np.array([[9, -1, 9]] * 2)}, "input_ids has -1 (allowed: 0 to "),
        ({"rope_cos": np.zeros((2, 3, 5), np.float32)}, "the decoder graph failed: "),
        ({"input_ids": np.zeros((2, 3), np.float32)}, "the decoder graph failed: "),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_step_that_does_not_fit_is_refused_in_one_line_and_the_cache_goes_on(engine, model, change, words) -> None:
    cache = engine.new_cache(2, 8)
    first = text_step(model, [[9, 20, 30], [40, 50, 60]], [0, 0])
    engine.forward(first, None, cache)
    good = text_step(model, [[11, 12, 13], [14, 15, 16]], [3, 3])
    with pytest.raises(EngineError) as raised:
        engine.forward(replace(good, **change), None, cache)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    fresh = engine.new_cache(2, 8)
    engine.forward(first, None, fresh)
    assert_close(engine.forward(good, None, cache), engine.forward(good, None, fresh))


def test_step_of_another_batch_is_refused(engine, model) -> None:
    with pytest.raises(EngineError, match="a step of 2 sequences does not fit into a cache of 1"):
        engine.forward(text_step(model, [[9], [20]], [0, 0]), None, engine.new_cache(1, 8))


def test_visual_index_past_the_features_is_refused(engine, model, rng) -> None:
    step = replace(text_step(model, [[9, 20]], [0]), visual_index=np.array([[-1, 5]]))
    with pytest.raises(EngineError, match="visual_index = 5, but the step has 5 visual features"):
        engine.forward(step, features(model, 5, rng), engine.new_cache(1, 8))


def test_patches_of_an_image_that_do_not_follow_each_other_are_refused(engine, model, rng) -> None:
    vision = model.vision
    width = vision.channels * vision.temporal_patch_size * vision.patch_size**2
    tables = pack_grids([(2, 2), (2, 2)], vision)
    patches = rng.standard_normal((8, width), np.float32)
    engine.encode(VisionInputs(patches, *tables))
    with pytest.raises(EngineError, match="segment_id falls"):
        engine.encode(VisionInputs(patches, *tables[:-1], tables.segment_id[::-1].copy()))


def test_graph_of_another_model_than_the_manifest_says_is_refused(tiny_bundle: Path, model) -> None:
    opened = Bundle.open(tiny_bundle)
    graphs = open_graphs(opened, "ort-cpu")
    metadata, (first, *others) = opened.engine("ort-cpu")[1], opened.engine("ort-cpu")[1].states
    assert isinstance(first, PagedKV)
    wrong = [(msgspec.structs.replace(model, hidden=model.hidden + 1), metadata)]
    changes: list[dict[str, Any]] = [{"kv_heads": 3}, {"key_dim": first.key_dim + 1}, {"dtype": "int8"}]
    kept = [(first,), *((msgspec.structs.replace(first, **change), *others) for change in changes)]
    wrong += [(model, msgspec.structs.replace(metadata, states=states)) for states in kept]
    for described in wrong:
        with pytest.raises(EngineError, match=r"^the (decoder|vision) graph[^\n]+manifest\.json[^\n]+$"):
            OrtEngine(*graphs, *described, threads=1)


def test_vision_inputs_of_another_model_are_refused_in_one_line(engine, model) -> None:
    inputs = VisionInputs(np.zeros((4, 7), np.float32), *pack_grids([(2, 2)], model.vision))
    with pytest.raises(EngineError, match="the vision graph failed: ") as raised:
        engine.encode(inputs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a"])
def test_broken_graph_file_is_refused_by_name(content: bytes, name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "engines/ort-cpu" / name).write_bytes(content)
    rehash(copy, f"engines/ort-cpu/{name}")
    with pytest.raises(EngineError, match=f"ONNX Runtime refused {name}: |{name} is no ONNX graph: ") as raised:
        load(copy, "ort-cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, 100])
def test_short_weights_are_refused(size: int, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    os.truncate(copy / "engines/ort-cpu/decoder.onnx.data", size)
    rehash(copy, "engines/ort-cpu/decoder.onnx.data")
    with pytest.raises(MoevlmError, match=r"decoder\.onnx"):
        load(copy, "ort-cpu")


@pytest.mark.parametrize("target", ENGINES)
def test_weights_are_those_that_were_checked_whatever_becomes_of_their_path(
    target: str, tiny_bundle: Path, tmp_path: Path, model
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    opened = Bundle.open(copy)
    graphs = open_graphs(opened, target)
    for graph in graphs:
        data = graph.path.with_name(f"{graph.path.name}.data")
        (tmp_path / "zeros").write_bytes(bytes(data.stat().st_size))
        (tmp_path / "zeros").replace(data)
    swapped = OrtEngine(*graphs, opened.manifest.model, opened.engine(target)[1], threads=1)
    plain = load(tiny_bundle, target)
    step = text_step(model, [[9, 20, 30]], [0])
    expected = plain.forward(step, None, plain.new_cache(1, 8))
    np.testing.assert_array_equal(swapped.forward(step, None, swapped.new_cache(1, 8)), expected)


def test_weights_that_are_cut_short_under_a_running_engine_are_an_error(
    tiny_bundle: Path, tmp_path: Path, model
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    engine = load(copy, "ort-cpu")
    cache, step = engine.new_cache(1, 8), text_step(model, [[9, 20, 30]], [0])
    engine.forward(step, None, cache)
    os.truncate(copy / "engines/ort-cpu/decoder.onnx.data", 4096)
    with pytest.raises(EngineError, match=r"decoder\.onnx\.data was cut short while it was in use: it has 4096 of"):
        engine.forward(step, None, cache)
    os.truncate(copy / "engines/ort-cpu/vision.onnx.data", 0)
    patches = np.zeros((4, model.vision.channels * model.vision.temporal_patch_size * model.vision.patch_size**2))
    inputs = VisionInputs(patches.astype(np.float32), *pack_grids([(2, 2)], model.vision))
    with pytest.raises(EngineError, match=r"vision\.onnx\.data was cut short"):
        engine.encode(inputs)


def test_weights_are_mapped_and_not_copied_and_let_go_when_an_engine_closes(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tiny_bundle, tmp_path)  # other tests' engines may be alive
    folder = str(copy / "engines/ort-cpu")

    def mapped() -> set[str]:
        gc.collect()
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[-1] for line in lines if folder in line}

    engine = load(copy, "ort-cpu")
    assert mapped() == {f"{folder}/vision.onnx.data", f"{folder}/decoder.onnx.data"}
    engine.close()
    assert not mapped()


def test_threads_share_one_runtime(tiny_bundle: Path) -> None:
    runtime = load_runtime(tiny_bundle, threads=1)
    rng = np.random.default_rng(6)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 8 * n, 3), np.uint8)) for n in range(2, 6)]

    def answer(picture: Image.Image) -> list[int]:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
        pieces = runtime.generate([{"role": "user", "content": content}], max_new_tokens=12, temperature=1.0, seed=1)
        return [token for piece in pieces for token in piece.token_ids]

    alone = [answer(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, pictures * 3)) == alone * 3
