"""Bytes and multiplications that the manifest states, against the checkpoint's own shapes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moevlm.export.build import build
from moevlm.runtime.core.engine_metadata import CostMetadata

HIDDEN, EXPERTS, WIDTH, VOCABULARY = 64, 8, 32, 96
QKV, OUT = HIDDEN * (4 + 2 + 2) * 16, 4 * 16 * HIDDEN
EXPERT = 3 * HIDDEN * WIDTH
LAYERS = 2
# 32 rows of a block share 32 bytes of scales and the values: 4.5 and 8.5 bits a weight in moevlm's kernels.
BITS = {"cpu:int4": 4.5, "cpu:int8": 8.5, "ort-cpu:int4": 5, "ort-cpu:int8": 9}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CostMetadata]:
    from tests.support.tiny import TinyCheckpoint

    text = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "vocab_size": VOCABULARY}
    vision = {"out_hidden_size": HIDDEN, "deepstack_visual_indexes": []}
    folder = tmp_path_factory.mktemp("cost")
    checkpoint = TinyCheckpoint(text=text, vision=vision).save(folder / "checkpoint")
    found = build(checkpoint, folder / "b", ["reference", "ort-cpu", *BITS]).manifest.engines
    return {name: metadata.cost for name, metadata in found.items()}


@pytest.mark.parametrize("target", ["reference", "ort-cpu", *BITS])
def test_multiplications_are_those_of_the_model(target: str, engines: dict[str, CostMetadata]) -> None:
    cost = engines[target]
    assert cost.dense_macs == LAYERS * (QKV + OUT + EXPERTS * HIDDEN)
    assert cost.expert_macs == LAYERS * EXPERT
    assert cost.head_macs == VOCABULARY * HIDDEN
    patch, merged = 3 * 2 * 4 * 4, 4 * 16
    blocks = 2 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 24)
    assert cost.patch_macs == pytest.approx(patch * 16 + blocks + (merged * merged + merged * HIDDEN) / 4, abs=2)
    assert cost.patch_pair_macs == 2 * 2 * 16


@pytest.mark.parametrize("target", ["reference", "ort-cpu"])
def test_float32_reads_four_bytes_a_weight(target: str, engines: dict[str, CostMetadata]) -> None:
    cost = engines[target]
    assert cost.dense_bytes == 4 * cost.dense_macs
    assert cost.expert_bytes == 4 * cost.expert_macs
    assert cost.head_bytes == 4 * cost.head_macs


@pytest.mark.parametrize("target", BITS)
def test_quantized_weights_read_their_bits_and_scales(target: str, engines: dict[str, CostMetadata]) -> None:
    cost, byte = engines[target], BITS[target] / 8
    experts = -(-EXPERTS // 32) * 32 if target.startswith("cpu") else EXPERTS  # in panels of 32
    router = 4 * LAYERS * experts * HIDDEN
    assert cost.expert_bytes == byte * LAYERS * EXPERT
    assert cost.dense_bytes == byte * LAYERS * (QKV + OUT) + router
    assert cost.head_bytes == byte * VOCABULARY * HIDDEN


def test_cost_survives_the_addition_of_a_target(save_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from moevlm.export.build import add_targets

    checkpoint = save_checkpoint()
    first = build(checkpoint, tmp_path / "b", ["ort-cpu"]).manifest.engines["ort-cpu"]
    both = add_targets(tmp_path / "b", checkpoint, ["reference"]).manifest.engines
    assert both["ort-cpu"] == first
    assert both["reference"].cost is not None
