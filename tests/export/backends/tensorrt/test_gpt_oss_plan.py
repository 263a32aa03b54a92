"""A real engine of TensorRT-RTX of gpt-oss with its published experts: what it launches, read from its file."""

from itertools import pairwise
from pathlib import Path

import pytest

from bench.plan_launches import Launch, launches
from moevlm.export.build import build
from moevlm.runtime.bundle.reader import Bundle
from tests.support.families.gpt_oss import publish
from tests.support.tiny import TinyCheckpoint

NAME = "rtx:sm89:bf16-fp4"
MOST_OF_A_LAYER = 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("gpt_oss")
    tiny = TinyCheckpoint("gpt_oss", text={"num_hidden_layers": 3, "intermediate_size": 32})
    checkpoint = publish(tiny.save(folder / "floats"), folder / "checkpoint")
    return build(checkpoint, folder / "b.moevlm", ["rtx:sm89"])


@pytest.fixture(scope="module")
def profiles(bundle: Bundle) -> list[list[Launch]]:
    return launches(bundle.path(bundle.manifest.engines[NAME].decoder).read_bytes())


def test_experts_are_those_of_the_checkpoint(bundle: Bundle) -> None:
    engine = bundle.manifest.engines[NAME]
    assert (engine.recoded, engine.weight_errors) == ({"fp4 kept": 6}, {})


def test_attention_and_experts_are_the_plugins_alone(profiles: list[list[Launch]]) -> None:
    for found in profiles:
        plugins = [launch.plugin for launch in found if launch.plugin]
        assert plugins[:-1] == ["PagedAttention", "MoERouter", "MoEExperts"] * 3, plugins
        assert not [launch for launch in found if launch.kind == "copy"]


def test_biases_of_experts_are_inputs_of_the_plugin(profiles: list[list[Launch]]) -> None:
    names = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
    for found in profiles:
        for i, launch in enumerate(launch for launch in found if launch.plugin == "MoEExperts"):
            assert {f"layers.{i}.feed_forward.{name}" for name in names} <= {*launch.inputs}


def test_a_layer_has_few_launches(profiles: list[list[Launch]]) -> None:
    """The product of q, k and v, attention, the one behind it; a sum and a norm; the router's product, routing,
    experts; a sum and a norm up to the next layer.
    """
    for found in profiles:
        starts = [i for i, launch in enumerate(found) if launch.plugin == "PagedAttention"]
        assert [stop - start for start, stop in pairwise(starts)] == [MOST_OF_A_LAYER] * 2
