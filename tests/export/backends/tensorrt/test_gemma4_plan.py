"""A real engine of TensorRT-RTX of Gemma 4: what it launches, read from its file."""

from itertools import pairwise
from pathlib import Path

import pytest

from bench.plan_launches import Launch, launches
from moevlm.export.build import build
from tests.support.tiny import TinyCheckpoint

MOST_OF_A_LAYER = 11


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[list[Launch]]:
    """Two layers with windows, and one without, whose values are keys."""
    folder: Path = tmp_path_factory.mktemp("gemma4")
    checkpoint = TinyCheckpoint("gemma4", side_files=True).save(folder / "checkpoint")
    bundle = build(checkpoint, folder / "b.moevlm", ["rtx:sm89"])
    return launches(bundle.path(bundle.manifest.engines["rtx:sm89:bf16"].decoder).read_bytes())


def test_caches_and_what_image_tokens_see_are_the_plugin_s_alone(profiles: list[list[Launch]]) -> None:
    for found in profiles:
        assert not [launch for launch in found if launch.kind == "copy"]
        attention = [launch for launch in found if launch.plugin == "PagedAttention"]
        assert ["visible_end" in launch.inputs for launch in attention] == [True, True, False]
        for launch in found:
            named = (*launch.inputs, *launch.outputs)
            own = [name for name in named if "_cache." in name or name in ("page_table", "visible_end")]
            assert not own or launch.plugin == "PagedAttention", launch


def test_queries_keys_and_values_are_one_product_s(profiles: list[list[Launch]]) -> None:
    """Norms of values, and values that are keys, are the plugin's: nothing stands between it and the product."""
    for found in profiles:
        for before, launch in pairwise(found):
            assert launch.plugin != "PagedAttention" or before.kind == "fully_connected", (before, launch)


def test_a_layer_has_few_launches(profiles: list[list[Launch]]) -> None:
    """The product of q, k and v, attention, the one behind it; norms and sums; the router's product, routing, experts;
    the dense layer's two products and its activation; norms and sums up to the next layer.
    """
    for found in profiles:
        starts = [i for i, launch in enumerate(found) if launch.plugin == "PagedAttention"]
        assert [stop - start for start, stop in pairwise(starts)] == [MOST_OF_A_LAYER] * 2
        assert sum(launch.plugin == "MoERouter" for launch in found) == len(starts)
