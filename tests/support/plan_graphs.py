"""Graphs lowered for TensorRT, run in onnx's reference evaluator, and the canonical ones that they are held to."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator

from bench.visible_end import visible_ends
from moevlm.export.backends.tensorrt.passes.plugin_moe import expert_weights
from moevlm.export.graph.moe_functions import EXPERTS
from moevlm.export.graph.op import is_op
from moevlm.export.graph.weights import read
from moevlm.runtime.core.states import PAGE_SIZE, output_name
from tests.support.plugin_nodes import NODES, decoded, encoded, op_named, unpacked, written_rows

Arrays = dict[str, np.ndarray]
# Tokens kept and new ones of each sequence.
STEPS = {
    "mixture": ((0, 5), (70, 1), (4, 9), (63, 2), (0, 3)),
    "decode": ((9, 1), (64, 1), (127, 1)),
    "with empty sequences": ((0, 0), (5, 3), (7, 0), (7, 1)),
}


class Evaluator:
    """A lowered graph. experts: their weights, by name, read once."""

    def __init__(self, model: ir.Model) -> None:
        self._inputs, self._outputs = list(model.graph.inputs), list(model.graph.outputs)
        self._evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=list(NODES))
        self.experts = {name: read(weight) for name, weight in expert_weights(model).items()}

    def caches(self, pages: int) -> Arrays:
        """Empty ones, by name."""
        found = {}
        for value in self._inputs:
            if "_cache." in str(value.name):
                assert value.shape is not None and value.dtype is not None
                found[str(value.name)] = np.zeros((pages, *value.shape[1:]), value.dtype.numpy())
        return found

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name, float32 or int32. feeds: an array of another dtype than the graph's is converted.

        Caches of the right dtype are written in place.
        """
        given = dict(self.experts)
        for value in self._inputs:
            if value.name in feeds:
                assert value.dtype is not None
                given[str(value.name)] = feeds[str(value.name)].astype(value.dtype.numpy(), copy=False)
        arrays = self._evaluator.run(None, given)
        for value, array in zip(self._outputs, arrays, strict=True):
            assert ir.DataType.from_numpy(array.dtype) is value.dtype
        named = {str(value.name): array for value, array in zip(self._outputs, arrays, strict=True)}
        return {n: array if array.dtype == np.int32 else array.astype(np.float32) for n, array in named.items()}


def evaluate(model: ir.Model, feeds: Arrays, cache: str = "") -> Arrays:
    """Outputs by name, and states under the names that they have as the canonical graph's outputs, all float32.

    feeds: of the canonical graph, and left as they are. cache: how the graph's caches are quantized.
    """
    given = dict(feeds)
    states = [str(value.name) for value in model.graph.inputs if "_state." in str(value.name)]
    given |= {name: feeds[name].copy() for name in states}
    caches = {str(value.name): value for value in model.graph.inputs if "_cache." in str(value.name)}
    for name, value in caches.items():
        assert value.dtype is not None
        given[name] = encoded(feeds[name], cache) if cache else feeds[name].astype(value.dtype.numpy())
    found = Evaluator(model).run(given)
    for name in states:
        found[output_name(name)] = given[name]
    for name in caches:
        found[output_name(name)] = decoded(given[name], cache) if cache else given[name].astype(np.float32)
    return found


def canonical_outputs(model: ir.Model, feeds: Arrays) -> Arrays:
    """Of the float32 graph, its function bodies run by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))


def with_stored_experts(canonical: ir.Model, lowered: ir.Model) -> ir.Model:
    """The canonical graph with the experts' weights as the lowered one stores them: what is left is arithmetic."""
    model, stored = canonical.clone(), expert_weights(lowered)
    for node in model.graph:
        if not is_op(node, EXPERTS):
            continue
        twin = next(other for other in lowered.graph if other.name == node.name)
        arrays = [read(stored[str(value.name)]) for value in twin.inputs[3:] if value is not None]
        weights = unpacked(op_named(twin.attributes["program"].value), arrays)
        for value, array in zip(node.inputs[3:], weights.values(), strict=True):
            assert value is not None
            value.const_value = ir.tensor(array.reshape(value.shape.numpy()))
    return model


def in_question(name: str, array: np.ndarray, feeds: Arrays) -> np.ndarray:
    """Of a cache the rows that the step wrote, [T, heads, D], of a state those of its sequences; others as they are."""
    if "_state_out." in name:
        return array[feeds["state_row"]]
    if "_cache_out." not in name:
        return array
    return np.stack([array[page, :, row] for page, row in written_rows(feeds, PAGE_SIZE)])


def random_step(
    model: ir.Model, sequences: Sequence[tuple[int, int]], rng: np.random.Generator, visual: int = 5
) -> Arrays:
    """Inputs of a decoder's canonical graph. sequences: tokens kept and tokens in the step of each. visual: rows."""
    kept, new = (np.array(column, np.int32) for column in zip(*sequences, strict=True))
    needed = -(-(kept + new) // PAGE_SIZE)
    tokens, pages = int(new.sum()), 1 + int(needed.sum())
    order = iter(rng.permutation(np.arange(1, pages)))
    table = np.zeros((len(sequences), int(needed.max()) + 1), np.int32)
    for row, count in zip(table, needed, strict=True):
        row[:count] = [next(order) for _ in range(count)]
    sizes = {"tokens": tokens, "visual": visual, "pages": pages, "page": PAGE_SIZE, "rows": len(sequences) + 2}
    feeds = {
        "query_start": np.cumsum([0, *new], dtype=np.int32),
        "context_len": kept,
        "page_table": table,
        "input_ids": rng.integers(0, 200, tokens),
        "visual_index": rng.integers(-1, visual, tokens),
        "logits_index": np.arange(tokens, dtype=np.int32),
        "visible_end": visible_ends(sequences, np.random.RandomState(rng.integers(2**31))),
        "state_row": (1 + rng.permutation(len(sequences))).astype(np.int32),
    }
    wanted = {value.name for value in model.graph.inputs}
    feeds = {name: array for name, array in feeds.items() if name in wanted}
    return feeds | _random_floats(model, feeds, sizes, rng)


def random_images(model: ir.Model, patches: Sequence[int], rng: np.random.Generator) -> Arrays:
    """Inputs of a vision graph. patches: of each image."""
    feeds = {"image_start": np.cumsum([0, *patches], dtype=np.int32)}
    (index,) = [value for value in model.graph.inputs if value.name == "position_index"]
    assert index.shape is not None
    feeds["position_index"] = rng.integers(0, 25, (sum(patches), int(str(index.shape[1]))))
    return feeds | _random_floats(model, feeds, {"patches": sum(patches)}, rng)


def _random_floats(model: ir.Model, feeds: Arrays, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    """All other inputs, float32."""
    found = {}
    for value in model.graph.inputs:
        if value.name in feeds:
            continue
        assert value.shape is not None and value.dtype is ir.DataType.FLOAT
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        found[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    for cos in [name for name in found if name.startswith("rope_cos")]:
        angle = rng.uniform(0, 6, found[cos].shape).astype(np.float32)
        found |= {cos: np.cos(angle), cos.replace("cos", "sin"): np.sin(angle)}
    return found


def usual_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error that three of four rows exceed: a fault is in every row, but at a near tie a rounded router takes
    another expert, and that row and all behind it in its sequence are other ones.
    """
    assert got.shape == want.shape
    off, size = (np.linalg.norm(x.reshape(-1, x.shape[-1]), axis=1) for x in (got.astype(np.float64) - want, want))
    return float(np.quantile(off / size, 0.25))


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative, in the Frobenius norm."""
    assert got.shape == want.shape
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
