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

from moevlm.runtime.backends.ort.backend import open_graphs
from moevlm.runtime.backends.ort.binding import Binding
from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import EngineError, MoevlmError
from moevlm.runtime.core.states import PagedKV
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.vision_inputs import VisionInputs, pack
from tests.support.bundles import copy_bundle, rehash
from tests.support.packed_steps import Kept, reserved, rows

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


def features(model, rows: int, rng: np.random.Generator) -> HostFeatures:
    shape = (model.vision.deepstack, rows, model.hidden)
    return HostFeatures(rng.standard_normal(shape[1:], np.float32), rng.standard_normal(shape, np.float32))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def test_text_without_images_does_not_depend_on_visual_features(engine, model, rng) -> None:
    step = reserved(engine, model).step({0: [9, 20, 30]})
    alone = rows(engine.forward(step), 3)
    beside_images = rows(engine.forward(step, [FeatureRows.all_of(features(model, 5, rng))]), 3)
    assert alone.shape == (3, model.vocabulary)
    assert alone.dtype == np.float32
    np.testing.assert_array_equal(alone, beside_images)


def test_visual_rows_stand_in_for_tokens_and_reach_the_first_layers(engine, model, rng) -> None:
    step = reserved(engine, model).step({0: [9, 20, 30]})
    step = replace(step, visual_index=np.array([-1, 4, -1]))
    seen = features(model, 5, rng)

    def logits(visual: HostFeatures) -> np.ndarray:
        return rows(engine.forward(step, [FeatureRows.all_of(visual)]), 3)

    base = logits(seen)
    other_rows = replace(seen, embeds=seen.embeds.copy(), deepstack=seen.deepstack.copy())
    other_rows.embeds[:4], other_rows.deepstack[:, :4] = 7, 7
    np.testing.assert_array_equal(logits(other_rows), base)
    assert not np.allclose(logits(replace(seen, embeds=-seen.embeds)), base)
    for level in range(model.vision.deepstack):
        deepstack = seen.deepstack.copy()
        deepstack[level, 4] *= -1
        assert not np.allclose(logits(replace(seen, deepstack=deepstack)), base)


def test_a_mixture_of_prompts_and_decodes_equals_each_sequence_alone(tiny_bundle, model) -> None:
    engine = load(tiny_bundle, "reference")
    kept = reserved(engine, model, 3)
    together = [
        kept.run({1: [50, 60, 70], 0: [9, 20]}),
        kept.run({0: [30], 2: list(range(100, 170)), 1: [80]}),
        kept.run({2: [7, 8], 1: [], 0: [40]}),
    ]
    alone = [reserved(engine, model, 3).run({n: ids}) for n, ids in
             ((0, [9, 20, 30, 40]), (1, [50, 60, 70, 80]), (2, [*range(100, 170), 7, 8]))]  # fmt: skip
    for n, parts in (
        (0, [together[0][3:], together[1][:1], together[2][2:]]),
        (1, [together[0][:3], together[1][71:]]),
        (2, [together[1][1:71], together[2][:2]]),
    ):
        assert_close(np.concatenate(parts), alone[n])
    assert not np.allclose(alone[0], alone[1])


def test_one_pass_equals_steps_of_any_size(engine, model) -> None:
    ids = list(range(9, 150))  # of several pages, or more than a sequence's page first has room for
    expected = reserved(engine, model).run(ids)
    for sizes in ([1] * 3 + [61] * 2 + [16], [100, 41], [64, 64, 13]):
        kept, got, done = reserved(engine, model), [], 0
        for size in sizes:
            got.append(kept.run(ids[done : done + size]))
            done += size
        assert_close(np.concatenate(got), expected)


def test_only_the_logits_asked_for_are_returned_in_order(engine, model) -> None:
    kept = reserved(engine, model)
    step = kept.step({0: [9, 20, 30, 40, 50, 60]})
    every = rows(engine.forward(step), 6)
    some = engine.forward(replace(step, logits_index=np.array([4, 0], np.int32)))
    assert_close(rows(some, 2), every[[4, 0]])
    none = engine.forward(replace(step, logits_index=np.zeros(0, np.int32)))
    assert len(none.candidates.values) == 0
    kept.lengths[0] = 6
    assert_close(kept.run([70]), reserved(engine, model).run([9, 20, 30, 40, 50, 60, 70])[-1:])


def test_candidates_are_the_largest_logits(engine, model) -> None:
    output = engine.forward(reserved(engine, model).step({0: [9, 20, 30]}))
    logits, found = rows(output, 3), output.candidates
    order = np.argsort(-logits, axis=1, kind="stable")[:, :256]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_array_equal(found.values, np.take_along_axis(logits, order, 1))
    exact = np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(found.log_sum_exp, exact, rtol=1e-6)


def test_candidates_and_logits_survive_the_next_step_once_they_were_made(engine, model) -> None:
    kept = reserved(engine, model)
    output = engine.forward(kept.step({0: [9, 20]}))
    made = [output.logits(0), output.logits(1), output.candidates.values]
    copies = [array.copy() for array in made]
    engine.forward(kept.step({0: [30, 40]}))
    for array, copy in zip(made, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_sequences_of_one_pool_are_independent_and_pages_are_used_again(engine, model) -> None:
    kept = reserved(engine, model, 2)
    kept.run({0: [9, 20]})
    kept.run({1: [70, 80, 90]})
    after_one = kept.run({0: [30]})
    kept.lengths[1] = 0
    again = kept.run({1: [9, 20, 30]})
    assert_close(after_one, again[2:])


def test_a_copied_page_goes_on_by_itself(engine, model) -> None:
    kept = reserved(engine, model, 2, tokens=60)
    kept.run({0: [9, 20]})
    kept.lengths[1] = 2
    copied = replace(kept.step({1: [40]}), copies=((kept.pages[0][0], kept.pages[1][0]),))
    other = rows(engine.forward(copied), 1)
    assert_close(kept.run({0: [30]}), reserved(engine, model).run([9, 20, 30])[2:])
    assert_close(other, reserved(engine, model).run([9, 20, 40])[2:])


def test_a_step_of_the_same_shapes_binds_nothing_anew(engine, model, monkeypatch) -> None:
    bound: list[str] = []
    real = Binding.__init__

    def watched(self: Binding, *arguments: Any) -> None:
        real(self, *arguments)
        self._binding = Watched(self._binding, bound)

    monkeypatch.setattr(Binding, "__init__", watched)
    kept = reserved(engine, model)
    kept.run(list(range(9, 20)))
    kept.run([9])
    bound.clear()
    for _ in range(30):
        kept.run([9])
    assert bound == []


class Watched:
    """An IOBinding whose calls that bind are noted."""

    def __init__(self, binding: Any, bound: list[str]) -> None:
        self._binding, self._bound = binding, bound

    def __getattr__(self, name: str) -> Any:
        if name.startswith("bind_"):
            self._bound.append(name)
        return getattr(self._binding, name)


def test_two_images_of_different_size_equal_two_single_calls(engine, model, rng) -> None:
    vision = model.vision
    width = vision.channels * vision.temporal_patch_size * vision.patch_size**2
    grids = [(4, 2), (2, 6)]
    patches = [rng.standard_normal((h * w, width), np.float32) for h, w in grids]
    together = engine.encode(pack(np.concatenate(patches), grids, vision))
    alone = [engine.encode(pack(p, [grid], vision)) for p, grid in zip(patches, grids, strict=True)]
    assert_close(together.embeds, np.concatenate([a.embeds for a in alone]))
    assert_close(together.deepstack, np.concatenate([a.deepstack for a in alone], axis=1))
    assert together.deepstack.shape == (vision.deepstack, 5, model.hidden)


@pytest.mark.parametrize("target", ENGINES)
def test_debug_outputs_come_with_the_logits_and_change_nothing(target: str, tiny_bundle: Path, model) -> None:
    graph = onnx.load(tiny_bundle / Bundle.open(tiny_bundle).engine(target)[1].decoder, load_external_data=False)
    names = ["layers.1.hidden", "layers.0.router_logits"]
    for name in names:
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]))
    tapped, plain = load(tiny_bundle, target, graph.SerializeToString()), load(tiny_bundle, target)
    kept = reserved(tapped, model)
    step = kept.step({0: [9, 20, 30, 40]})
    output = tapped.forward(step)
    assert list(output.outputs) == names
    assert output.outputs["layers.1.hidden"].shape == (4, model.hidden)
    assert output.outputs["layers.0.router_logits"].shape == (4, model.layers[0].experts)
    kept.lengths[0] = 4
    later = tapped.forward(kept.step({0: [50, 60, 70, 80, 90, 99]}))
    assert later.outputs["layers.1.hidden"].shape == (6, model.hidden)
    assert_close(rows(output, 4), reserved(plain, model).run([9, 20, 30, 40]))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"context_len": np.array([600], np.int32)}, "context_len has 600 (allowed: 0 to 512)"),
    ({"context_len": np.array([511], np.int32)}, "the length of a sequence has 514 (allowed: 0 to 512)"),
    ({"query_start": np.array([0, 2], np.int32)}, "query_start = [0, 2] (allowed: rising from 0 to the 3 tokens)"),
    ({"query_start": np.array([0], np.int32)}, "query_start has the shape [1] (allowed: [2])"),
    ({"visual_index": np.array([-1, 0, -1])}, "visual_index has 0 (allowed: -1 to -1)"),
    ({"visual_index": np.array([-1, 0])}, "visual_index has the shape [2] (allowed: [3])"),
    ({"logits_index": np.array([99], np.int32)}, "logits_index has 99 (allowed: 0 to 2)"),
    ({"input_ids": np.array([9, 1 << 40, 9])}, "input_ids has 1099511627776 (allowed: 0 to "),
    ({"input_ids": np.array([9, -1, 9])}, "input_ids has -1 (allowed: 0 to "),
    ({"page_table": np.array([[0]], np.int32)}, "page_table has 0 (allowed: 1 to "),
    ({"page_table": np.array([[99]], np.int32)}, "page_table has 99 (allowed: 1 to "),
    ({"page_table": np.zeros((1, 0), np.int32)}, "page_table has 0 pages for 6 tokens (allowed: 1 or more)"),
    ({"copies": ((1, 0),)}, "copies has 0 (allowed: 1 to "),
    ({"rope": {"0": (np.zeros((3, 5), np.float32),) * 2}}, "the decoder graph failed: "),
    ({"input_ids": np.zeros(3, np.float32)}, "the decoder graph failed: "),
]


@pytest.mark.parametrize(
    ("change", "words"), BAD, ids=[f"{next(iter(change))}-{n}" for n, (change, _) in enumerate(BAD)]
)
def test_step_that_does_not_fit_is_refused_in_one_line_and_the_pool_goes_on(engine, model, change, words) -> None:
    kept = reserved(engine, model)
    kept.run([9, 20, 30])
    good = kept.step({0: [11, 12, 13]})
    with pytest.raises(EngineError) as raised:
        engine.forward(replace(good, **change))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert_close(kept.run([11, 12, 13]), reserved(engine, model).run([9, 20, 30, 11, 12, 13])[3:])


def test_step_without_a_pool_or_of_too_many_sequences_is_refused(tiny_bundle, model) -> None:
    engine = load(tiny_bundle, "ort-cpu")
    step = Kept(engine, model, [0, 0], [[1], [2]]).step({0: [9], 1: [20]})
    with pytest.raises(EngineError, match="a step before any page was reserved"):
        engine.forward(step)
    with pytest.raises(EngineError, match=r"pages = 1 \(allowed: 2 or more\)"):
        engine.reserve(1, 0)
    engine.reserve(3, 0)
    with pytest.raises(EngineError, match=r"a step of 2 sequences \(allowed: 1 to 1\)"):
        engine.forward(step)


def test_visual_index_past_the_features_is_refused(engine, model, rng) -> None:
    step = replace(reserved(engine, model).step({0: [9, 20]}), visual_index=np.array([-1, 5]))
    with pytest.raises(EngineError, match=r"visual_index has 5 \(allowed: -1 to 4\)"):
        engine.forward(step, [FeatureRows.all_of(features(model, 5, rng))])


def test_images_that_do_not_begin_where_others_end_are_refused(engine, model, rng) -> None:
    patches = rng.standard_normal((8, model.vision.patch_width), np.float32)
    inputs = pack(patches, [(2, 2), (2, 2)], model.vision)
    engine.encode(inputs)
    for starts in ([0, 5, 4, 8], [0, 4], [1, 4, 8], [0]):
        with pytest.raises(EngineError, match=r"image_start = .* \(allowed: rising from 0 to the 8 patches\)"):
            engine.encode(VisionInputs(inputs.rows, np.array(starts, np.int32)))


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
    inputs = pack(np.zeros((4, 7), np.float32), [(2, 2)], model.vision)
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
    expected = reserved(plain, model).run([9, 20, 30])
    np.testing.assert_array_equal(reserved(swapped, model).run([9, 20, 30]), expected)


def test_weights_that_are_cut_short_under_a_running_engine_are_an_error(
    tiny_bundle: Path, tmp_path: Path, model
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    engine = load(copy, "ort-cpu")
    step = reserved(engine, model).step({0: [9, 20, 30]})
    engine.forward(step)
    os.truncate(copy / "engines/ort-cpu/decoder.onnx.data", 4096)
    with pytest.raises(EngineError, match=r"decoder\.onnx\.data was cut short while it was in use: it has 4096 of"):
        engine.forward(step)
    os.truncate(copy / "engines/ort-cpu/vision.onnx.data", 0)
    patches = np.zeros((4, model.vision.channels * model.vision.temporal_patch_size * model.vision.patch_size**2))
    inputs = pack(patches.astype(np.float32), [(2, 2)], model.vision)
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
    runtime = load_runtime(tiny_bundle, options=LoadOptions(threads=1))
    rng = np.random.default_rng(6)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 8 * n, 3), np.uint8)) for n in range(2, 6)]

    def answer(picture: Image.Image) -> list[int]:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
        pieces = runtime.generate([{"role": "user", "content": content}], max_new_tokens=12, temperature=1.0, seed=1)
        return [token for piece in pieces for token in piece.token_ids]

    alone = [answer(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, pictures * 3)) == alone * 3
