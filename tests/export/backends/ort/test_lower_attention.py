"""com.microsoft::GroupQueryAttention in the place of moevlm::PagedAttention, for one sequence in one page."""

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
from moevlm.plugins.ops.attention import attention
from moevlm.plugins.ops.spec import DOMAIN, AttentionSpec, attributes
from tests.support.attention_variants import AttentionVariant

CAPACITY = 24
TOLERANCE = 2e-6  # float32 against float64
OPTIONAL = ("v", "cos", "sin", "q_norm", "k_norm", "sinks", "visible_end")
ONE_PAGE = {"page_table": np.zeros((1, 1), np.int32)}
VARIANTS = {
    "plain": AttentionVariant(AttentionSpec(4, 4, 16), 16, 16),
    "grouped": AttentionVariant(AttentionSpec(4, 2, 16), 16, 16),
    "one kv head": AttentionVariant(AttentionSpec(8, 1, 32), 32, 32),
    "half rotated": AttentionVariant(AttentionSpec(6, 3, 32), 64, 64),
    "not rotated": AttentionVariant(AttentionSpec(4, 2, 0), 16, 16),
    "norms": AttentionVariant(AttentionSpec(4, 2, 16, epsilon=0.05), 16, 16, norms=True),
    "window": AttentionVariant(AttentionSpec(4, 2, 16, window=5), 16, 16),
    "window of one": AttentionVariant(AttentionSpec(4, 2, 16, window=1), 16, 16),
    "softcap": AttentionVariant(AttentionSpec(4, 2, 16, softcap=1.5), 16, 16),
    "sinks": AttentionVariant(AttentionSpec(4, 2, 16, window=3), 16, 16, sinks=True),
    "values normed": AttentionVariant(AttentionSpec(4, 2, 16, epsilon=0.05, value_norm=True), 16, 16, norms=True),
    "values from keys": AttentionVariant(
        AttentionSpec(4, 2, 16, epsilon=0.05, value_is_key=True, value_norm=True), 16, 16, norms=True
    ),
    "everything": AttentionVariant(
        AttentionSpec(4, 2, 8, scale=0.5, window=6, softcap=2.0, epsilon=0.05), 16, 16, norms=True, sinks=True
    ),
}
# Steps of (tokens already in the page, tokens in the step); one may be behind where the last one ended.
STEPS = {
    "one pass": [(0, 9)],
    "decode": [(0, 7), (7, 1), (8, 1)],
    "one token at first": [(0, 1), (1, 1)],
    "chunks": [(0, 4), (4, 4), (8, 3)],
    "back again": [(0, 9), (3, 2), (5, 1)],
    "to the last place": [(0, 21), (21, 1), (22, 2)],
}

Array = np.ndarray


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def layers(variant: AttentionVariant, count: int = 1) -> ir.Model:
    """q.0, k.0, ... -> y.0, ...: attention nodes side by side on the same rotary tables and sequences."""
    spec = variant.spec
    table, int32 = ["tokens", spec.rotary_dim // 2], ir.DataType.INT32
    ropes = [value(name, table) if spec.rotary_dim else None for name in ("cos", "sin")]
    places = [value("query_start", ["starts"], int32), value("context_len", ["sequences"], int32)]
    places.append(value("page_table", ["sequences", "table"], int32))
    inputs, outputs, nodes = [*filter(None, ropes), *places], [], []
    dims = {"key": variant.key_dim, "value": variant.value_dim}
    for i in range(count):
        own = [value(f"q.{i}", ["tokens", spec.heads * variant.key_dim])]
        own += [
            value(f"{k[0]}.{i}", ["tokens", spec.kv_heads * dim]) if k == "key" or spec.has_values else None
            for k, dim in dims.items()
        ]
        caches = [value(f"{k}_cache.{i}", ["pages", spec.kv_heads, "page", dim]) for k, dim in dims.items()]
        norms = [value(f"{n}.{i}", [variant.key_dim]) for n in ("q_norm", "k_norm") if variant.norms]
        sinks = [value(f"sinks.{i}", [spec.heads])] if variant.sinks else []
        ends = [value(f"visible_end.{i}", ["tokens"], int32)] if variant.images else []
        made = [value(f"y.{i}", ["tokens", spec.heads * variant.value_dim])]
        made += [value(f"{k}_cache_out.{i}", ["pages", spec.kv_heads, "page", dim]) for k, dim in dims.items()]
        arguments = [*own, *ropes, *caches, *places, *(norms or [None, None]), *(sinks or [None]), *ends]
        nodes.append(ir.node("PagedAttention", arguments, attributes(spec), domain=DOMAIN, outputs=made))
        inputs += [*filter(None, own), *caches, *norms, *sinks, *ends]
        outputs += made
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": ONNX_OPSET, DOMAIN: 1}, name="attention")
    return ir.Model(graph, ir_version=11)


def lowered(variant: AttentionVariant) -> onnxruntime.InferenceSession:
    model = layers(variant)
    assert run([LowerAttention()], model) == {"LowerAttention": 1}
    assert not model.functions
    assert {node.op_type for node in model.graph if node.domain} == {"GroupQueryAttention"}
    return session(model)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def step_inputs(variant: AttentionVariant, context: int, tokens: int, rng: np.random.Generator) -> dict[str, Array]:
    spec = variant.spec
    angle = rng.uniform(0, 6, (tokens, spec.rotary_dim // 2)).astype(np.float32)
    tables = {"cos": np.cos(angle), "sin": np.sin(angle)} if spec.rotary_dim else {}
    return tables | {
        "q": 3 * rng.standard_normal((tokens, spec.heads * variant.key_dim), np.float32),
        "k": rng.standard_normal((tokens, spec.kv_heads * variant.key_dim), np.float32),
        **(
            {"v": rng.standard_normal((tokens, spec.kv_heads * variant.value_dim), np.float32)}
            if spec.has_values
            else {}
        ),
        "query_start": np.array([0, tokens], np.int32),
        "context_len": np.array([context], np.int32),
        "page_table": np.array([[7]], np.int32),  # of some pool; the graph is given that page alone
    }


def fixed_inputs(variant: AttentionVariant, rng: np.random.Generator) -> dict[str, Array]:
    """Caches full of what earlier requests may have left there, and the parameters of a layer."""
    spec, shape = variant.spec, (1, variant.spec.kv_heads, CAPACITY)
    given = {f"{name}_norm": rng.uniform(0.5, 1.5, variant.key_dim) for name in "qk" if variant.norms}
    given |= {"sinks": rng.standard_normal(spec.heads)} if variant.sinks else {}
    given |= {"key_cache": 5 * rng.standard_normal((*shape, variant.key_dim))}
    given |= {"value_cache": 5 * rng.standard_normal((*shape, variant.value_dim))}
    return {name: array.astype(np.float32) for name, array in given.items()}


def assert_close(ours: list[Array], theirs: tuple[Array, ...], end: int) -> None:
    """Equal up to the last token: what a cache that was returned separately holds behind it is nobody's."""
    for name, mine, other in zip(("y", "keys", "values"), ours, theirs, strict=True):
        mine, other = (array if name == "y" else array[:, :, :end] for array in (mine, other))
        assert relative_error(mine, other) < TOLERANCE, name


@pytest.mark.parametrize("in_place", [False, True], ids=["separate", "in_place"])
@pytest.mark.parametrize("name", VARIANTS)
def test_lowered_attention_equals_the_spec(name: str, in_place: bool) -> None:
    variant = VARIANTS[name]
    running = lowered(variant)
    wanted = {given.name for given in running.get_inputs()}
    for steps in STEPS.values():
        rng = np.random.default_rng(5)
        held = fixed_inputs(variant, rng)
        buffers = {key: onnxruntime.OrtValue.ortvalue_from_numpy(held[key]) for key in ("key_cache", "value_cache")}
        for context, tokens in steps:
            step = step_inputs(variant, context, tokens, rng) | held
            theirs = attention(**dict.fromkeys(OPTIONAL) | step | ONE_PAGE, spec=variant.spec)
            feeds = {f"{key}.0": array for key, array in step.items()} | step
            feeds = {key: array for key, array in feeds.items() if key in wanted}
            ours = _run_in_place(running, feeds, buffers) if in_place else running.run(None, feeds)
            assert_close(ours, theirs, context + tokens)
            held |= {"key_cache": theirs[1], "value_cache": theirs[2]}


def _run_in_place(
    running: onnxruntime.InferenceSession, feeds: dict[str, Array], buffers: dict[str, onnxruntime.OrtValue]
) -> list[Array]:
    binding = running.io_binding()
    for name, array in feeds.items():
        if name.removesuffix(".0") not in buffers:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y.0")
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(f"{name}.0", buffer)
        binding.bind_ortvalue_output(f"{name}_out.0", buffer)
    running.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    assert [output.data_ptr() for output in outputs[1:]] == [buffer.data_ptr() for buffer in buffers.values()]
    return [outputs[0].numpy(), *(buffer.numpy().copy() for buffer in buffers.values())]


def test_nothing_behind_the_last_token_is_seen() -> None:
    """What stood in the page from an earlier request changes nothing."""
    variant, rng = VARIANTS["grouped"], np.random.default_rng(8)
    running, held, step = lowered(variant), fixed_inputs(variant, rng), step_inputs(variant, 6, 2, rng)

    def y() -> Array:
        feeds = {f"{key}.0": array for key, array in (step | held).items()} | step
        return running.run(None, {given.name: feeds[given.name] for given in running.get_inputs()})[0]

    expected = y()
    for name in ("key_cache", "value_cache"):
        held[name][:, :, 8:] = 1e6
    np.testing.assert_array_equal(y(), expected)


@pytest.mark.parametrize(
    "variant",
    [
        AttentionVariant(AttentionSpec(4, 2, 16), 32, 16),
        AttentionVariant(AttentionSpec(4, 2, 8, rotary_start=8), 16, 16),
        AttentionVariant(AttentionSpec(4, 2, 16, window=3), 16, 16, images=True),
        AttentionVariant(AttentionSpec(4, 2, 16, chunk=5), 16, 16),
    ],
    ids=["values of another size", "rotated behind", "images", "chunks"],
)
def test_what_the_kernel_cannot_express_keeps_its_body_and_reads_the_one_page(variant: AttentionVariant) -> None:
    model = layers(variant)
    run([LowerAttention()], model)
    assert [node.op_type for node in model.graph] == ["PagedAttention"]
    rng = np.random.default_rng(9)
    step = step_inputs(variant, 3, 4, rng) | fixed_inputs(variant, rng)
    if variant.images:
        step["visible_end"] = np.array([4, 7, 7, 7], np.int32)
    theirs = attention(**dict.fromkeys(OPTIONAL) | step | ONE_PAGE, spec=variant.spec)
    running = session(model)
    feeds = {f"{key}.0": array for key, array in step.items()} | step
    assert_close(running.run(None, {i.name: feeds[i.name] for i in running.get_inputs()}), theirs, 7)


def test_lengths_and_tables_are_computed_once_for_all_layers() -> None:
    def added(count: int) -> int:
        model = layers(VARIANTS["grouped"], count)
        LowerAttention().apply(model)
        return len(model.graph)

    one, two, three = added(1), added(2), added(3)
    assert three - two == two - one <= 8
    assert one > two - one


def test_model_without_attention_stays_as_it_is() -> None:
    model = layers(VARIANTS["plain"], 0)
    add_functions(model)
    assert run([LowerAttention()], model) == {"LowerAttention": 0}
    assert "com.microsoft" not in model.graph.opset_imports
