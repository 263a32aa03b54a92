"""A real engine of TensorRT-RTX of Llama 4: what it launches, read from its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.plan_launches import Launch, launches
from moevlm.export.build import build
from moevlm.runtime.bundle.reader import Bundle
from tests.support.tiny import TinyCheckpoint

ROPE = ["rope_cos.0", "rope_sin.0"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three layers with rope and chunks, and one without, whose queries are scaled; two of them have experts."""
    folder: Path = tmp_path_factory.mktemp("llama4")
    checkpoint = TinyCheckpoint("llama4", text={"interleave_moe_layer_step": 2}).save(folder / "checkpoint")
    return build(checkpoint, folder / "b.moevlm", ["rtx:sm89"])


def profiles(bundle: Bundle, graph: str) -> list[list[Launch]]:
    engine = bundle.manifest.engines["rtx:sm89:bf16"]
    return launches(bundle.path(getattr(engine, graph)).read_bytes())


def test_caches_rotation_and_norms_of_keys_are_the_plugin_s_alone(bundle: Bundle) -> None:
    for found in profiles(bundle, "decoder"):
        assert not [launch for launch in found if launch.kind == "copy"]
        attention = [launch for launch in found if launch.plugin == "PagedAttention"]
        assert [[name for name in launch.inputs if "rope" in name] for launch in attention] == [ROPE, ROPE, ROPE, []]
        for launch in found:
            own = [name for name in (*launch.inputs, *launch.outputs) if "_cache." in name or "rope" in name]
            assert not own or launch.plugin == "PagedAttention", launch


def test_queries_of_the_layer_without_rope_are_scaled_in_one_launch(bundle: Bundle) -> None:
    for found in profiles(bundle, "decoder"):
        (place,) = [i for i, launch in enumerate(found) if "query_scale" in launch.inputs]
        assert found[place + 1].plugin == "PagedAttention"
        assert found[place - 1].kind == "fully_connected"


def test_two_layers_have_experts(bundle: Bundle) -> None:
    for found in profiles(bundle, "decoder"):
        assert [launch.plugin for launch in found if "MoE" in launch.plugin] == ["MoERouter", "MoEExperts"] * 2


def test_patches_of_tiles_see_each_other_in_the_plugin(bundle: Bundle) -> None:
    for found in profiles(bundle, "vision"):
        assert sum(launch.plugin == "SegmentAttention" for launch in found) == 2
