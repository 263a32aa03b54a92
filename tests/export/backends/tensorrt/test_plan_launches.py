"""What real engines launch, read from their files: no GPU, and nothing of TensorRT's own in the way of our kernels."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from bench.plan_launches import PLUGIN, Launch, launches
from moevlm.export.build import build
from moevlm.plugins.gpu.program import MAGIC
from moevlm.runtime.bundle.reader import Bundle
from tests.plugins.gpu.program_reader import read_first
from tests.support.hybrid import save

NAME = "rtx:sm86,sm89:bf16"
SM, ONE_SEQUENCE = 89, {"T": 1, "N": 1, "M": 64, "P": 8}
OTHERS = ("mha", "Exp", "Scat")  # in the names of TensorRT's own kernels of attention, softmax, and writes to a cache
MOST_OF_A_LAYER = 8


@pytest.fixture(scope="module")
def decoder(rtx_bundle: Bundle) -> bytes:
    return rtx_bundle.path(rtx_bundle.manifest.engines[NAME].decoder).read_bytes()


@pytest.fixture(scope="module")
def vision(rtx_bundle: Bundle) -> bytes:
    return rtx_bundle.path(rtx_bundle.manifest.engines[NAME].vision).read_bytes()


def kernels_of_a_decode_step(plan: bytes) -> dict[str, int]:
    """Launches and fills by op, out of the programs that the engine carries, for one sequence."""
    found, at = {}, plan.find(MAGIC)
    while at >= 0:
        program, length = read_first(plan[at:])
        (image,) = [image for image in program["images"] if image["sm"] == SM]
        holds = [v for v in image["variants"] if all(_value(bound) <= 0 for bound in v["bounds"])]
        found[program["op"]] = len(holds[0]["steps"])
        at = plan.find(MAGIC, at + length)
    return found


def _value(linear: dict[str, int]) -> int:
    return linear["offset"] + sum(linear[name] * size for name, size in ONE_SEQUENCE.items())


def layers_of(found: list[Launch]) -> list[list[Launch]]:
    """From each attention up to the next: as many as a layer has."""
    starts = [i for i, launch in enumerate(found) if launch.plugin == "PagedAttention"]
    return [found[start:stop] for start, stop in pairwise(starts)]


def only_the_plugin_touches_caches(decoder: bytes, layers: int) -> None:
    for found in launches(decoder):
        for launch in found:
            named = (*launch.inputs, *launch.outputs)
            own = [name for name in named if "_cache" in name or name in ("page_table", "visible_end")]
            assert not own or launch.plugin == "PagedAttention", launch
        assert not [launch for launch in found if launch.kind == "copy"]
        assert Counter(launch.plugin for launch in found)["PagedAttention"] == layers


def test_caches_and_page_tables_are_touched_by_the_plugin_alone(decoder: bytes) -> None:
    only_the_plugin_touches_caches(decoder, layers=2)


@pytest.mark.usefixtures("hybrid_family")
def test_every_kind_of_attention_is_the_plugin_s_in_quantized_caches(tmp_path: Path) -> None:
    """Windows, softcap, sinks, values of another size than keys, images whose tokens see each other."""
    layers = "local", "wide", "images"
    built = build(save(tmp_path / "hybrid", layers), tmp_path / "b", ["rtx:sm89"], kv_cache="int8")
    engine = built.manifest.engines["rtx:sm89:bf16"]
    assert [state.dtype for state in engine.states] == ["int8"] * len(layers)
    only_the_plugin_touches_caches(built.path(engine.decoder).read_bytes(), len(layers))


def test_attention_is_the_plugin_s_without_a_mask(decoder: bytes, vision: bytes) -> None:
    assert Counter(launch.plugin for launch in launches(vision)[0])["SegmentAttention"] == 2
    for plan in (decoder, vision):
        for found in launches(plan):
            names = [launch.name for launch in found if launch.kind != PLUGIN]
            assert not [name for name in names for other in OTHERS if other in name]
    for launch in launches(vision)[0]:
        assert "image_start" not in launch.inputs or launch.plugin == "SegmentAttention", launch


def test_layer_of_a_decode_step_has_few_launches(decoder: bytes) -> None:
    """Eight operations: norm, q and k and v, attention, its projection with the sum, norm, router's product, routing,
    experts; two of the three plugins launch twice.
    """
    _, decode = launches(decoder)
    for layer in layers_of(decode):
        assert len(layer) <= MOST_OF_A_LAYER, [launch.name for launch in layer]
    kernels = kernels_of_a_decode_step(decoder)
    assert kernels.keys() == {"PagedAttention", "MoERouter", "MoEExperts", "Candidates"}
    (layer,) = layers_of(decode)
    assert sum(kernels.get(launch.plugin, 1) for launch in layer) <= 10, kernels


def test_rows_of_q_k_and_v_are_one_product_s(decoder: bytes, vision: bytes) -> None:
    for plan, op in ((decoder, "PagedAttention"), (vision, "SegmentAttention")):
        for found in launches(plan):
            for before, launch in pairwise(found):
                assert launch.plugin != op or before.kind in ("fully_connected", "runtime_fusion"), (before, launch)
