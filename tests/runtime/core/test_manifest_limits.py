"""Numbers of a manifest that no model has, and graphs that are not the manifest's: told when a bundle is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from moevlm.runtime.backends.ort.backend import open_graphs
from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, EngineError
from tests.support.bundles import copy_bundle, edit_manifest
from tests.support.command_line import assert_refused, call

VALUES: list[tuple[str, Any]] = [
    *(("model." + field, value) for field in ("hidden", "context") for value in (0, -1, 10**15)),
    ("model.vocabulary", 0),
    ("model.vocabulary", 10**9),
    ("model.layers", []),
    ("model.ropes", []),
    *((f"model.layers[1].{field}", value) for field in ("heads", "kv_heads", "key_dim", "experts", "top_k")
      for value in (-1, 10**9)),
    ("model.layers[1].top_k", 0),
    ("model.layers[1].top_k", 9),
    ("model.layers[1].kv_heads", 3),
    ("model.layers[1].window", -1),
    ("model.layers[1].chunk", -1),
    ("model.image_token_id", -1),
    ("model.image_token_id", 10**6),
    ("model.image_marks", {"row_break": [10**6]}),
    ("model.image_marks", {"row_break": [1] * 65}),
    ("model.video.end", [1] * 65),
    ("model.video.placeholder", 10**6),
    ("model.video.end", [10**6]),
    ("model.eos_token_ids", [-1]),
    ("model.eos_token_ids", [10**23]),
    *(("model.ropes[0].dim", value) for value in (-2, 0, 31, 10**12)),
    *(("model.ropes[0].theta", value) for value in (0.0, -1.0)),
    *(("model.ropes[0].sections", value) for value in ([-3, -3, 14], [1, 1, 1], [10**9, 0, 0], [8])),
    *(("model.query_scale", {"beta": 0.1, "original": 8, field: -1}) for field in ("beta", "offset")),
    ("model.query_scale", {"beta": 0.1, "original": 0}),
    *(("model.ropes[0].factor", value) for value in (0.0, -1.0, 1e9)),
    *(("model.ropes[0].frequencies", value) for value in ([1.0], [-1.0] * 8, [1e30] * 8)),
    *((f"model.vision.{field}", value) for field in ("patch_size", "merge_size", "temporal_patch_size", "channels")
      for value in (0, -1, 10**9)),
    *(("model.vision.position_grid", value) for value in (0, -1, 2**65)),
    ("model.vision.deepstack", -1),
    ("model.vision.head_dim", 10**12),
    ("model.vision.rope_theta", 0.0),
    ("model.vision.position_resampling", "nearest"),
    ("engines.ort-cpu.group_size", -1),
    ("engines.ort-cpu.page_size", 48),
    ("engines.ort-cpu.states[0].dtype", "float8"),
    ("engines.ort-cpu.states[0].layer", 2),
    ("engines.ort-cpu.states[0].kv_heads", 0),
    ("engines.ort-cpu.states[1].key_dim", 10**12),
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_bundle(tiny_bundle, tmp_path_factory.mktemp("limits"))


@pytest.mark.parametrize(("field", "value"), VALUES, ids=str)
def test_a_number_that_no_model_has_is_refused_by_name(field: str, value: object, bundle: Path) -> None:
    *folders, last = field.split(".")
    content = (bundle / "manifest.json").read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for folder in folders:
            name, _, index = folder.rstrip("]").partition("[")
            place = place[name][int(index)] if index else place[name]
        assert last in place
        place[last] = value

    edit_manifest(bundle, change)
    try:
        with pytest.raises(BundleError, match=r"^unsupported value in manifest\.json: [^\n]*\(allowed: ") as raised:
            Bundle.open(bundle)
    finally:
        (bundle / "manifest.json").write_bytes(content)
    assert field in str(raised.value)


def test_the_message_names_what_is_allowed(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tiny_bundle, tmp_path)
    edit_manifest(copy, lambda m: m["model"]["vision"].update(patch_size=0))
    words = "unsupported value in manifest.json: model.vision.patch_size = 0 (allowed: 1 to 1024)"
    assert_refused(call("inspect", copy), words)


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_of_many_digits_is_one_line(digits: int, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tiny_bundle, tmp_path)
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"context": 512', f'"context": {"9" * digits}'))
    assert_refused(call("inspect", copy), "manifest.json")


def swapped(vision: Any, decoder: Any) -> None:
    vision_graph = onnx.ModelProto()
    vision_graph.CopyFrom(vision)
    vision.CopyFrom(decoder)
    decoder.CopyFrom(vision_graph)


def without(name: str) -> Callable[[Any, Any], None]:
    def change(vision: Any, decoder: Any) -> None:
        for graph in (vision.graph, decoder.graph):
            for values in (graph.input, graph.output):
                for value in values:
                    if value.name == name:
                        value.name = f"{name}.renamed"
                        for node in graph.node:
                            for names in (node.input, node.output):
                                for i, used in enumerate(names):
                                    names[i] = f"{name}.renamed" if used == name else used

    return change


def with_sizes(name: str, sizes: list[int] | None) -> Callable[[Any, Any], None]:
    def change(vision: Any, decoder: Any) -> None:
        for graph in (vision.graph, decoder.graph):
            for value in (*graph.input, *graph.output):
                if value.name == name:
                    value.type.tensor_type.ClearField("shape")
                    for size in sizes or []:
                        value.type.tensor_type.shape.dim.add().dim_value = size

    return change


GRAPHS: dict[str, Callable[[Any, Any], None]] = {
    "swapped": swapped,
    "no cache": without("key_cache.0"),
    "no logits": without("logits"),
    "no cosines": without("rope_cos"),
    "no shape": with_sizes("key_cache.0", None),
    "absurd features": with_sizes("deepstack_embeds", [2**31, 1, 32]),
    "other patches": with_sizes("pixel_patches", [4, 7]),
    "other positions": with_sizes("position_index", [4, 16]),
}


@pytest.mark.parametrize("change", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_that_is_not_the_model_s_is_refused_at_load(change: Callable, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    files = open_graphs(bundle, "ort-cpu")
    vision, decoder = (onnx.load_model_from_string(file.data) for file in files)
    change(vision, decoder)
    changed = [
        replace(file, data=graph.SerializeToString()) for file, graph in zip(files, (vision, decoder), strict=True)
    ]
    with pytest.raises(EngineError, match=r"^(the (vision|decoder) graph|ONNX Runtime refused)[^\n]*$"):
        OrtEngine(*changed, bundle.manifest.model, bundle.engine("ort-cpu")[1], threads=1)


def test_a_closed_runtime_says_so(tiny_bundle: Path) -> None:
    from moevlm.runtime import load

    runtime = load(tiny_bundle, "ort-cpu", threads=1)
    messages = [{"role": "user", "content": "Hi"}]
    answer = runtime.generate(messages, max_new_tokens=5)
    next(answer)
    runtime.close()
    runtime.close()
    with pytest.raises(EngineError, match="this engine was closed"):
        list(answer)
    with pytest.raises(EngineError, match="this engine was closed"):
        list(runtime.generate(messages, max_new_tokens=5))
