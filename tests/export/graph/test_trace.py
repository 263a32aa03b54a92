"""The canonical graphs: their contract, their size, and the same numbers as the modules in two ONNX runtimes."""

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from moevlm.export.families import family_for
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.translate import Translator
from moevlm.export.graph.weights import Constant, Weight
from moevlm.export.model import CanonicalModel, load
from moevlm.export.modules.decoder import Decoder
from moevlm.export.modules.vision import vision_tower
from moevlm.export.parity.measures import relative_error
from moevlm.plugins.ops.spec import DOMAIN
from moevlm.runtime.core.errors import ExportError
from tests.support.tiny import GLM, QWEN, TinyCheckpoint

ROPE = QWEN["text"]["rope_parameters"]
MODELS = {
    "qwen": TinyCheckpoint(),
    "qwen, three levels, attention bias, dense layer": TinyCheckpoint(
        text={"num_hidden_layers": 3, "mlp_only_layers": [1], "attention_bias": True, "num_key_value_heads": 1},
        vision={"depth": 3, "deepstack_visual_indexes": [2, 0, 1], "num_position_embeddings": 9},
    ),
    "qwen, no deepstack, tied head": TinyCheckpoint(
        vision={"deepstack_visual_indexes": [], "patch_size": 3, "temporal_patch_size": 1},
        top={"tie_word_embeddings": True},
    ),
    "glm": TinyCheckpoint("glm4v_moe", text={"num_key_value_heads": 4}),
    "glm, one group, all sparse": TinyCheckpoint(
        "glm4v_moe", text={"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "attention_bias": False}
    ),
}
models = pytest.mark.parametrize("name", MODELS)


class Unread:
    """A weight that must not be read while a model is traced."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError(f"read [{start}:{stop}]")


def canonical(tiny: TinyCheckpoint, weight: Callable[[tuple[int, ...]], Weight] = Unread) -> CanonicalModel:
    """A model whose weights come from `weight` instead of from a checkpoint."""
    values = tiny.config().to_dict()
    family = family_for(values)
    config = family.config(values)
    with torch.device("meta"):
        towers = vision_tower(config.vision).eval(), Decoder(config.decoder).eval()
    weights = ({name: weight(tuple(p.shape)) for name, p in tower.named_parameters()} for tower in towers)
    return CanonicalModel(family, config, *towers, *weights, {}, {})


def random_weights(seed: int) -> Callable[[tuple[int, ...]], Weight]:
    rng = np.random.default_rng(seed)

    def weight(shape: tuple[int, ...]) -> Weight:
        values = rng.standard_normal(shape, np.float32)
        return Constant(values / np.float32(shape[-1] ** 0.5) if len(shape) > 1 else 1 + values / 5)

    return weight


def protos(model: CanonicalModel) -> dict[str, onnx.ModelProto]:
    for graph in model.graphs.values():
        add_functions(graph)
    return {name: ir.to_proto(graph) for name, graph in model.graphs.items()}


def signature(values: Iterable[ir.Value]) -> dict[str, tuple[str, list[str | int]]]:
    """name -> (dtype, dimensions), in order."""
    dimensions = {v.name: [d if isinstance(d, int) else d.value for d in v.shape] for v in values}
    return {v.name: (v.dtype.name, dimensions[v.name]) for v in values}


def test_decoder_has_the_documented_inputs_and_outputs() -> None:
    graph = canonical(TinyCheckpoint()).graphs["decoder"].graph
    cache = ["pages", 2, "page", 16]
    inputs = signature(graph.inputs)
    documented = {
        "input_ids": ("INT64", ["tokens"]),
        "visual_embeds": ("FLOAT", ["visual", 32]),
        "deepstack_embeds": ("FLOAT", [2, "visual", 32]),
        "visual_index": ("INT64", ["tokens"]),
        "rope_cos.0": ("FLOAT", ["tokens", 8]),
        "rope_sin.0": ("FLOAT", ["tokens", 8]),
        "query_start": ("INT32", ["starts"]),
        "context_len": ("INT32", ["sequences"]),
        "page_table": ("INT32", ["sequences", "table"]),
        "logits_index": ("INT32", ["logits"]),
        **{f"{kind}_cache.{i}": ("FLOAT", cache) for i in range(2) for kind in ("key", "value")},
    }
    assert list(inputs.items()) == list(documented.items())
    outputs = signature(graph.outputs)
    documented = {
        "logits": ("FLOAT", ["logits", 263]),
        **{f"{kind}_cache_out.{i}": ("FLOAT", cache) for i in range(2) for kind in ("key", "value")},
    }
    assert list(outputs.items()) == list(documented.items())


@pytest.mark.parametrize("name", ["glm", "qwen, no deepstack, tied head"])
def test_decoder_without_deepstack_has_no_input_for_it(name: str) -> None:
    inputs = signature(canonical(MODELS[name]).graphs["decoder"].graph.inputs)
    assert "deepstack_embeds" not in inputs
    assert inputs["rope_cos.0"] == ("FLOAT", ["tokens", 4 if name == "glm" else 8])  # glm rotates one half


@pytest.mark.parametrize(("name", "taps", "levels"), [("qwen", 4, 2), ("glm", 16, 0)])
def test_vision_has_the_documented_inputs_and_outputs(name: str, taps: int, levels: int) -> None:
    graph = canonical(MODELS[name]).graphs["vision"].graph
    inputs = signature(graph.inputs)
    patches = inputs["pixel_patches"][1][0]
    assert isinstance(patches, str)
    assert inputs == {
        "pixel_patches": ("FLOAT", [patches, 3 * 2 * 4 * 4]),
        "position_index": ("INT64", [patches, taps]),
        "position_weight": ("FLOAT", [patches, taps]),
        "rope_cos": ("FLOAT", [patches, 4]),
        "rope_sin": ("FLOAT", [patches, 4]),
        "image_start": ("INT32", ["starts"]),
    }
    outputs = signature(graph.outputs)
    assert list(outputs) == ["visual_embeds", "deepstack_embeds"][: 1 + bool(levels)]
    assert outputs["visual_embeds"][1][1] == 32
    if levels:
        assert outputs["deepstack_embeds"][1][0::2] == [levels, 32]


def test_taps_are_named_values_of_the_decoder() -> None:
    graph = canonical(MODELS["qwen, three levels, attention bias, dense layer"]).graphs["decoder"].graph
    names = {value.name for node in graph for value in node.outputs}
    routed = {f"layers.{i}.{what}" for i in (0, 2) for what in ("router_logits", "expert_index", "expert_weight")}
    assert routed | {f"layers.{i}.hidden" for i in range(3)} <= names
    assert not any(name.startswith("layers.1.router") for name in names if name)


def test_no_weight_is_read_while_tracing_and_each_keeps_its_name() -> None:
    model = canonical(TinyCheckpoint())  # every read of a weight raises
    for graph, weights in (("vision", model.vision_weights), ("decoder", model.decoder_weights)):
        initializers = model.graphs[graph].graph.initializers
        assert set(weights) <= set(initializers)
        for name, weight in weights.items():
            assert initializers[name].const_value.weight is weight
        constants = [value for name, value in initializers.items() if name not in weights]
        assert sum(value.const_value.size for value in constants) < 100


def test_tied_head_is_one_initializer_used_twice() -> None:
    initializers = canonical(MODELS["qwen, no deepstack, tied head"]).graphs["decoder"].graph.initializers
    assert "head" not in initializers
    assert len(initializers["embedding"].consumers()) == 2


def node_counts(**text: int) -> dict[str, int]:
    graphs = canonical(TinyCheckpoint(text=text)).graphs
    return {name: sum(1 for _ in model.graph.all_nodes()) for name, model in graphs.items()}


def test_graph_size_does_not_depend_on_the_number_of_experts() -> None:
    assert node_counts(num_experts=4) == node_counts(num_experts=64)


def test_a_layer_takes_few_nodes() -> None:
    twelve, two = node_counts(num_hidden_layers=12), node_counts(num_hidden_layers=2)
    assert twelve["decoder"] < 900
    assert (twelve["decoder"] - two["decoder"]) / 10 < 30
    assert twelve["vision"] == two["vision"] < 100


@models
def test_checker_accepts_both_graphs_with_all_shapes_inferred(name: str) -> None:
    for proto in protos(canonical(MODELS[name], random_weights(1))).values():
        onnx.checker.check_model(proto, full_check=True)
        assert {f.domain for f in proto.functions} == {DOMAIN}


def decoder_feeds(model: CanonicalModel, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two sequences of two and four tokens, the first behind five that it keeps; it sees images."""
    inputs = signature(model.graphs["decoder"].graph.inputs)
    sizes = {"tokens": 6, "visual": 4, "pages": 6, "page": 4}
    feeds = {
        name: rng.standard_normal([sizes.get(d, d) for d in shape], np.float32)
        for name, (dtype, shape) in inputs.items()
        if dtype == "FLOAT"
    }
    angle = rng.uniform(0, 6, feeds["rope_cos.0"].shape).astype(np.float32)
    int32 = {"query_start": [0, 2, 6], "context_len": [5, 0], "page_table": [[4, 1], [3, 0]], "logits_index": [5, 1]}
    return feeds | {
        "rope_cos.0": np.cos(angle),
        "rope_sin.0": np.sin(angle),
        "input_ids": rng.integers(0, 200, 6),
        "visual_index": np.array([3, 0, -1, -1, -1, -1]),
        **{name: np.array(values, np.int32) for name, values in int32.items()},
    }


def vision_feeds(model: CanonicalModel, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two images of one and two merged patches."""
    vision = model.config.vision
    inputs = signature(model.graphs["vision"].graph.inputs)
    patches = 3 * vision.merge_size**2
    feeds = {n: rng.standard_normal((patches, s[1]), np.float32) for n, (t, s) in inputs.items() if t == "FLOAT"}
    rows = rng.integers(0, vision.position_grid**2, feeds["position_weight"].shape)
    starts = np.array([0, 1, 3], np.int32) * vision.merge_size**2
    return feeds | {"position_index": rows, "image_start": starts}


def in_torch(model: CanonicalModel, name: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    tensors = {key: torch.from_numpy(array) for key, array in feeds.items()}
    vision, decoder = model.towers()
    load(vision, model.vision_weights)
    load(decoder, model.decoder_weights)
    with torch.no_grad():
        if name == "vision":
            return [output.numpy() for output in vision(**tensors) if output is not None]
        layers = range(len(model.config.decoder.layers))
        states = [(tensors.pop(f"key_cache.{i}"), tensors.pop(f"value_cache.{i}")) for i in layers]
        ropes = [(tensors.pop("rope_cos.0"), tensors.pop("rope_sin.0"))]
        absent = dict.fromkeys(("deepstack_embeds", "visible_end", "query_scale", "state_row"))
        logits, states = decoder(**absent | tensors, ropes=ropes, states=states)
    return [logits.numpy(), *(tensor.numpy() for pair in states for tensor in pair)]


@models
def test_graphs_give_the_modules_numbers_in_onnxruntime_and_in_the_reference_evaluator(name: str) -> None:
    model, rng = canonical(MODELS[name], random_weights(2)), np.random.default_rng(3)
    for graph, proto in protos(model).items():
        feeds = {"vision": vision_feeds, "decoder": decoder_feeds}[graph](model, rng)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results = {
            "onnxruntime": session.run(None, feeds),
            "reference evaluator": ReferenceEvaluator(proto).run(None, feeds),
        }
        expected = in_torch(model, graph, feeds)
        for runtime, outputs in results.items():
            assert len(outputs) == len(expected) == len(proto.graph.output)
            for value, ours, theirs in zip(proto.graph.output, outputs, expected, strict=True):
                assert relative_error(ours, theirs) < 1e-5, (graph, runtime, value.name)


def test_towers_that_were_given_weights_leave_the_traced_ones_without() -> None:
    model = canonical(TinyCheckpoint(), random_weights(4))
    for tower, weights in zip(model.towers(), (model.vision_weights, model.decoder_weights), strict=True):
        load(tower, weights)
        assert all(parameter.device.type == "cpu" for parameter in tower.parameters())
    for tower in (model.vision, model.decoder):
        assert all(parameter.is_meta for parameter in tower.parameters())
    assert set(model.graphs) == {"vision", "decoder"}


def test_glm_variants_differ_from_qwen_where_they_should() -> None:
    """The comparison above covers what it says: groups, biases and shared experts are in the graphs."""
    names = {name: set(canonical(MODELS[name]).decoder_weights) for name in ("qwen", "glm")}
    assert {n for n in names["glm"] if "correction_bias" in n} == {"layers.1.feed_forward.correction_bias"}
    assert any("shared" in n for n in names["glm"]) > any("shared" in n for n in names["qwen"])
    router = next(n for n in canonical(MODELS["glm"]).graphs["decoder"].graph if n.op_type == "MoERouter")
    assert router.attributes["n_group"].as_int() == GLM["text"]["n_group"]
    assert len(router.inputs) == 2


def test_operator_without_a_translation_is_named() -> None:
    class Cumulative(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(0)

    program = torch.export.export(Cumulative(), (torch.zeros(3),), strict=False)
    with pytest.raises(ExportError, match=r"no ONNX translation for aten.cumsum.default \(known: .*linear"):
        Translator(program, {}).model("g", {"x": (3,)}, ("y",))
