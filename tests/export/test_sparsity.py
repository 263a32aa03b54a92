"""2:4 pruning: the rule by definition, in slices, and in engines read back from disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moevlm.export import weights
from moevlm.export.build import build
from moevlm.export.quantization import Scheme, dequantize, quantize
from moevlm.export.sparsity import prune, pruned
from moevlm.export.weights import Constant, read

# Small whole numbers: ties, zeros and both signs are common.
matrices = st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda size: arrays(np.float32, (size[0], 4 * size[1]), elements=st.integers(-3, 3).map(np.float32))
)
KEPT = ("embedding", "head", "router")  # and what is no matrix: norms, biases, routed experts


@given(matrices)
def test_two_smallest_of_every_four_are_zero_and_the_rest_is_untouched(rows: np.ndarray) -> None:
    result = prune(rows)
    assert (result.shape, result.dtype) == (rows.shape, rows.dtype)
    for before, after in zip(rows.reshape(-1, 4), result.reshape(-1, 4), strict=True):
        first, second = sorted(range(4), key=lambda i: (-abs(before[i]), i))[:2]
        expected = np.zeros(4, np.float32)
        expected[[first, second]] = before[[first, second]]
        assert after.tobytes() == expected.tobytes()


@given(matrices)
def test_pruning_again_changes_nothing(rows: np.ndarray) -> None:
    assert prune(prune(rows)).tobytes() == prune(rows).tobytes()


@given(matrices, st.data())
def test_slices_are_those_of_the_whole(rows: np.ndarray, data: st.DataObject) -> None:
    weight = pruned(Constant(rows))
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    assert weight.rows(start, stop).tobytes() == prune(rows)[start:stop].tobytes()
    assert read(weight).tobytes() == prune(rows).tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zero_when_quantized(bits: int) -> None:
    rows = prune(np.random.default_rng().standard_normal((32, 128)).astype(np.float32))
    back = dequantize(*quantize(rows, Scheme(bits, 32)), Scheme(bits, 32))
    assert not back[rows == 0].any()


def initializers(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    path = bundle / f"engines/ort-cpu/{graph}.onnx"
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "glm4v_moe"])
def test_engine_is_two_of_four_where_layers_are_dense_and_as_given_elsewhere(
    model_type: str, save_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SLICE_BYTES", 512)
    # A shared expert 22 wide: its way down has a width that 4 does not divide.
    checkpoint = save_checkpoint(model_type=model_type, text={"moe_intermediate_size": 22})
    dense, sparse = (
        build(checkpoint, tmp_path / name, ["ort-cpu"], sparsity=sparsity)
        for name, sparsity in (("dense", ""), ("sparse", "2:4"))
    )
    zeros = 0
    for graph in ("vision", "decoder"):
        before, after = initializers(dense.directory, graph), initializers(sparse.directory, graph)
        assert before.keys() == after.keys()
        for name, array in before.items():
            if array.ndim == 2 and array.shape[1] % 4 == 0 and not any(part in name for part in KEPT):
                fours = after[name].reshape(-1, 4)
                assert ((fours == 0).sum(1) == 2).all(), name
                assert after[name].tobytes() == prune(array).tobytes(), name
                zeros += after[name].size // 2
            else:
                assert after[name].tobytes() == array.tobytes(), name
    facts = sparse.manifest.engines["ort-cpu"]
    assert (facts.sparsity, facts.pruned_weights) == ("2:4", zeros)
    assert zeros > 5000
    facts = dense.manifest.engines["ort-cpu"]
    assert (facts.sparsity, facts.pruned_weights) == ("", 0)
