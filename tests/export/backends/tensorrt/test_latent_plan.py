"""A real engine of TensorRT-RTX with latent attention: what it launches, read from its file."""

from itertools import pairwise
from pathlib import Path

import pytest

from bench.plan_launches import Launch, launches
from moevlm.export.build import build
from moevlm.runtime.bundle.reader import Bundle
from tests.support.tiny import TinyCheckpoint

NAME = "rtx:sm89:bf16"
MOST_OF_A_LAYER = 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A dense layer and a sparse one."""
    folder: Path = tmp_path_factory.mktemp("latent")
    checkpoint = TinyCheckpoint("deepseek_v3", side_files=True).save(folder / "checkpoint")
    return build(checkpoint, folder / "b.moevlm", ["rtx:sm89"])


@pytest.fixture(scope="module")
def profiles(bundle: Bundle) -> list[list[Launch]]:
    return launches(bundle.path(bundle.manifest.engines[NAME].decoder).read_bytes())


def test_a_token_keeps_one_latent_in_the_dtype_of_activations(bundle: Bundle) -> None:
    states = bundle.manifest.engines[NAME].states
    assert [(state.kv_heads, state.token_bytes, state.value_in_key, state.dtype) for state in states] == [
        (1, 2 * (32 + 8), True, "bfloat16")
    ] * 2


def test_latents_are_the_plugin_s_alone(profiles: list[list[Launch]]) -> None:
    for found in profiles:
        assert not [launch for launch in found if launch.kind == "copy"]
        attention = [launch for launch in found if launch.plugin == "PagedAttention"]
        assert len(attention) == 2
        for launch in found:
            own = [name for name in (*launch.inputs, *launch.outputs) if "_cache." in name or name == "page_table"]
            assert not own or launch.plugin == "PagedAttention", launch


def test_both_latents_are_one_product_s_and_rows_are_put_together_at_once(profiles: list[list[Launch]]) -> None:
    """q_down and kv_down read the same rows; queries, absorbed and turned, and the key meet in one kernel."""
    for found in profiles:
        joined = [launch for launch in found if sum("Concat" in layer for layer in launch.layers) == 3]
        down = [launch for launch in found if launch.kind == "fully_connected" and len(launch.layers) == 2]
        assert len(joined) == 2
        for rows in joined:
            assert found[found.index(rows) + 1].plugin == "PagedAttention"
        products = [before for before, after in pairwise(found) if any("RMSNorm" in name for name in after.layers)]
        assert len([launch for launch in down if launch in products]) == 2


def test_a_layer_has_few_launches(profiles: list[list[Launch]]) -> None:
    """Attention, the product with value_up, the one behind it, three of the dense layer, and norms and sums; then the
    next layer's: latents, its norm, the queries, the product with key_up, the key's norm, rows put together.
    """
    for found in profiles:
        first, second = [i for i, launch in enumerate(found) if launch.plugin == "PagedAttention"]
        assert second - first == MOST_OF_A_LAYER
        assert sum("MatMul" in name for launch in found[first:second] for name in launch.layers) == 2
