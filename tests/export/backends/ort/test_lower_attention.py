"""com.microsoft::GroupQueryAttention in the place of moevlm::CachedAttention, in ONNX Runtime."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moevlm.export.backends.ort.passes.lower_attention import LowerAttention
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.op import ONNX_OPSET
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.base import run
from moevlm.plugins.ops.spec import DOMAIN

CAPACITY = 24
# float32 on both sides, sums in another order.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer. rotary_dim below head_dim: the rest of a head is not turned (GLM-4.5V)."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int

    def __str__(self) -> str:
        return f"{self.heads}q-{self.kv_heads}kv-{self.head_dim}d-{self.rotary_dim}r"


SHAPES = [Shape(4, 4, 16, 16), Shape(4, 2, 16, 16), Shape(8, 1, 32, 32), Shape(4, 2, 16, 8), Shape(6, 3, 64, 32)]
# Steps of (tokens already in each row's cache, tokens in the step); a row may be behind where the last step ended.
STEPS = {
    "one pass": [([0, 0, 0], 9)],
    "one sequence, then decode": [([0], 7), ([7], 1), ([8], 1)],
    "one token at first": [([0, 0], 1), ([1, 1], 1)],
    "chunks of a ragged batch": [([0, 0, 0], 4), ([4, 2, 4], 4), ([8, 2, 5], 3)],
    "decode of a ragged batch": [([0, 0, 0], 6), ([6, 1, 3], 1), ([7, 2, 4], 1), ([8, 3, 5], 1)],
    "rows at very different places": [([0, 13, 5], 3), ([3, 16, 8], 2)],
    "to the last place": [([0, 3], 21), ([21, 23], 1), ([22, 22], 2)],
}


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def layers(shape: Shape, count: int = 1) -> ir.Model:
    """q.0, k.0, ... -> y.0, ...: attention nodes side by side on the same rotary tables and positions."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    cache = ["batch", shape.kv_heads, "capacity", shape.head_dim]
    table = ["batch", "sequence", shape.rotary_dim // 2]
    shared = [value("cos", table), value("sin", table), value("cache_position", ["batch"], ir.DataType.INT64)]
    inputs, outputs, nodes = [*shared], [], []
    for i in range(count):
        own = [value(f"q.{i}", ["tokens", q]), value(f"k.{i}", ["tokens", kv]), value(f"v.{i}", ["tokens", kv])]
        caches = [value(f"key_cache.{i}", cache), value(f"value_cache.{i}", cache)]
        made = [value(f"y.{i}", ["tokens", q])]
        made += [value(f"{kind}_cache_out.{i}", cache) for kind in ("key", "value")]
        attributes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "rotary_dim": shape.rotary_dim}
        arguments = [*own, *shared[:2], *caches, shared[2]]
        nodes.append(ir.node("CachedAttention", arguments, attributes, domain=DOMAIN, outputs=made))
        inputs += own + caches
        outputs += made
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": ONNX_OPSET, DOMAIN: 1}, name="attention")
    return ir.Model(graph, ir_version=11)


def canonical(shape: Shape, count: int = 1) -> onnxruntime.InferenceSession:
    model = layers(shape, count)
    add_functions(model)
    return session(model)


def lowered(shape: Shape, count: int = 1) -> onnxruntime.InferenceSession:
    model = layers(shape, count)
    assert run([LowerAttention()], model) == {"LowerAttention": count}
    add_functions(model)
    assert not model.functions
    assert {node.op_type for node in model.graph if node.domain} == {"GroupQueryAttention"}
    return session(model)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(shape: Shape, position: list[int], tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    rows, kv = len(position) * tokens, shape.kv_heads * shape.head_dim
    angle = rng.uniform(0, 6, (len(position), tokens, shape.rotary_dim // 2)).astype(np.float32)
    return {
        "q.0": 3 * rng.standard_normal((rows, shape.heads * shape.head_dim), np.float32),
        "k.0": rng.standard_normal((rows, kv), np.float32),
        "v.0": rng.standard_normal((rows, kv), np.float32),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "cache_position": np.array(position),
    }


def caches(shape: Shape, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Full of what earlier requests may have left there."""
    size = (batch, shape.kv_heads, CAPACITY, shape.head_dim)
    return {f"{kind}_cache.0": 5 * rng.standard_normal(size, np.float32) for kind in ("key", "value")}


def run_separately(
    running: onnxruntime.InferenceSession, shape: Shape, steps: list[tuple[list[int], int]]
) -> list[list[np.ndarray]]:
    """Every step's y and caches, each step on the caches that the one before returned."""
    rng = np.random.default_rng(5)
    held, results = caches(shape, len(steps[0][0]), rng), []
    for position, tokens in steps:
        results.append(running.run(None, feeds(shape, position, tokens, rng) | held))
        held = {"key_cache.0": results[-1][1], "value_cache.0": results[-1][2]}
    return results


def run_in_place(
    running: onnxruntime.InferenceSession, shape: Shape, steps: list[tuple[list[int], int]]
) -> list[list[np.ndarray]]:
    """The same with one buffer per cache, bound as both input and output."""
    rng = np.random.default_rng(5)
    buffers = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
        for name, array in caches(shape, len(steps[0][0]), rng).items()
    }
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    results = []
    for position, tokens in steps:
        binding = running.io_binding()
        for name, array in feeds(shape, position, tokens, rng).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("y.0")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("cache", "cache_out"), buffer)
        running.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        assert [output.data_ptr() for output in outputs[1:]] == list(addresses.values())
        results.append([outputs[0].numpy(), *(buffer.numpy().copy() for buffer in buffers.values())])
    return results


def assert_close(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]], steps: list) -> None:
    """Equal up to each row's last token: what a cache that was returned separately holds behind it is nobody's."""
    for number, (mine, other, (position, tokens)) in enumerate(zip(ours, theirs, steps, strict=True)):
        assert relative_error(mine[0], other[0]) < TOLERANCE, f"y of step {number}"
        for kind in (1, 2):
            for row, start in enumerate(position):
                held, expected = (cache[kind][row, :, : start + tokens] for cache in (mine, other))
                assert relative_error(held, expected) < TOLERANCE, f"cache {kind} of step {number}, row {row}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_lowered_attention_equals_its_body(name: str, shape: Shape) -> None:
    expected = run_separately(canonical(shape), shape, STEPS[name])
    assert_close(run_separately(lowered(shape), shape, STEPS[name]), expected, STEPS[name])


@pytest.mark.parametrize("form", [canonical, lowered])
@pytest.mark.parametrize("name", STEPS)
def test_cache_written_in_place_equals_separate_buffers(name: str, form) -> None:
    shape = Shape(4, 2, 16, 8)
    separate = run_separately(form(shape), shape, STEPS[name])
    assert_close(run_in_place(form(shape), shape, STEPS[name]), separate, STEPS[name])


@pytest.mark.parametrize("form", [canonical, lowered])
def test_nothing_behind_a_rows_last_token_is_seen(form) -> None:
    """What stood in the cache from an earlier request, and another row's length, change nothing."""
    shape, rng = Shape(4, 2, 16, 16), np.random.default_rng(8)
    running, held = form(shape), caches(shape, 2, rng)
    step = feeds(shape, [6, 2], 2, rng)
    expected = running.run(None, step | held)[0]
    for array in held.values():
        array[0, :, 8:], array[1, :, 4:] = 1e6, -1e6
    np.testing.assert_array_equal(running.run(None, step | held)[0], expected)
    alone = {name: array[:2] if array.ndim == 2 else array[:1] for name, array in step.items()}
    y = running.run(None, alone | {name: array[:1] for name, array in held.items()})[0]
    assert relative_error(y, expected[:2]) < TOLERANCE


def test_lengths_are_computed_once_for_all_layers() -> None:
    def added(count: int) -> int:
        model = layers(SHAPES[0], count)
        LowerAttention().apply(model)
        return len(model.graph)

    one, two, three = added(1), added(2), added(3)
    assert three - two == two - one <= 8
    assert one > two - one


def test_model_without_attention_stays_as_it_is() -> None:
    model = layers(SHAPES[0], 0)
    assert run([LowerAttention()], model) == {"LowerAttention": 0}
    assert "com.microsoft" not in model.graph.opset_imports
