"""A real engine of TensorRT-RTX with layers of the gated delta rule: what it launches, read from its file."""

from collections import Counter

import pytest

from bench.plan_launches import launches
from moevlm.export.build import build
from moevlm.runtime.bundle.reader import Bundle
from tests.support.tiny import TinyCheckpoint

NAME = "rtx:sm89:bf16"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A layer of the delta rule and one of attention."""
    folder = tmp_path_factory.mktemp("recurrent")
    checkpoint = TinyCheckpoint("qwen3_5_moe", side_files=True).save(folder / "checkpoint")
    return build(checkpoint, folder / "b.moevlm", ["rtx:sm89"])


@pytest.fixture(scope="module")
def decoder(bundle: Bundle) -> bytes:
    return bundle.path(bundle.manifest.engines[NAME].decoder).read_bytes()


def test_the_manifest_has_states_in_float32_and_how_many_rows_fit(bundle: Bundle) -> None:
    engine = bundle.manifest.engines[NAME]
    assert engine.tensorrt is not None
    assert [(type(state).__name__, state.dtype) for state in engine.states] == [
        ("Recurrent", "float32"),
        ("Recurrent", "float32"),
        ("PagedKV", "bfloat16"),
    ]
    assert engine.tensorrt.max_rows == (2**31 - 1) // (4 * 8 * 16)


def test_states_are_touched_by_the_plugin_alone(decoder: bytes) -> None:
    for found in launches(decoder):
        assert Counter(launch.plugin for launch in found)["GatedDelta"] == 1
        assert not [launch for launch in found if launch.kind == "copy"]
        for launch in found:
            own = [name for name in (*launch.inputs, *launch.outputs) if "_state." in name or name == "state_row"]
            assert not own or launch.plugin == "GatedDelta", launch


def test_what_is_around_the_plugin_is_fused(decoder: bytes) -> None:
    """One product before it, and behind it the norm of heads with the gate, and the projection with the sum."""
    for found in launches(decoder):
        (at,) = [i for i, launch in enumerate(found) if launch.plugin == "GatedDelta"]
        before, _, norm, out = found[at - 1 : at + 3]
        assert before.kind == "fully_connected"
        assert any(all(f".{part}." in name for part in ("qkv", "a", "b", "z")) for name in before.inputs)
        ops = [{layer.removeprefix("node_").rpartition("_")[0] for layer in one.layers} for one in (norm, out)]
        assert ops == [{"RMSNormalization", "Reshape", "Split", "Sigmoid", "Mul"}, {"Gemm", "Add"}]


def test_a_shared_expert_takes_three_launches_and_its_gate_none(decoder: bytes) -> None:
    """A product, the activation, a product with the gate and the sums; the gate comes with the norm before it."""
    for found in launches(decoder):
        (start,) = [i for i, launch in enumerate(found) if launch.plugin == "PagedAttention"]
        (_, at) = [i for i, launch in enumerate(found) if launch.plugin == "MoEExperts"]
        layer, shared = found[start:at], found[at + 1 : at + 4]
        (norm,) = [launch for launch in layer if any("RMSNormalization" in name for name in launch.layers)]
        assert any("ReduceSum" in name for name in norm.layers) and any("Sigmoid" in name for name in norm.layers)
        assert [launch.kind for launch in shared] == ["fully_connected", "function", "runtime_fusion"]
        assert sum("Add" in name for name in shared[-1].layers) == 2
