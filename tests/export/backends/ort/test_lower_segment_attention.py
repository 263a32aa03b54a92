"""com.microsoft::MultiHeadAttention, image by image, in the place of moevlm::SegmentAttention, in ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from moevlm.export.backends.ort.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.op import ONNX_OPSET
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.base import run
from moevlm.plugins.ops.attention import segment_attention
from moevlm.plugins.ops.spec import DOMAIN
from moevlm.runtime.core.errors import UnsupportedModelError

HEADS, HEAD_DIM = 4, 16
# float32 on both sides, sums in another order.
TOLERANCE = 2e-6


def graph(rotates: bool = True) -> ir.Model:
    widths = dict.fromkeys("qkv", HEADS * HEAD_DIM) | dict.fromkeys(("cos", "sin"), HEAD_DIM // 2)
    values = [
        ir.Value(name=name, shape=ir.Shape(["patches", width]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, width in widths.items()
    ]
    values.append(ir.Value(name="image_start", shape=ir.Shape(["starts"]), type=ir.TensorType(ir.DataType.INT32)))
    inputs = [value if rotates or value.name not in ("cos", "sin") else None for value in values]
    node = ir.node("SegmentAttention", inputs, attributes={"heads": HEADS}, domain=DOMAIN)
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = values[0].type, values[0].shape
    values = [value for value in inputs if value is not None]
    model = ir.Model(
        ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": ONNX_OPSET, DOMAIN: 1}), ir_version=11
    )
    add_functions(model)
    return model


def feeds(sizes: list[int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    patches = sum(sizes)
    angle = rng.uniform(0, 6, (patches, HEAD_DIM // 2))
    arrays = {name: rng.standard_normal((patches, HEADS * HEAD_DIM), np.float32) for name in "qkv"}
    arrays |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    return arrays | {"image_start": np.cumsum([0, *sizes]).astype(np.int32)}


def outputs_of(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    data = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def lowered(rotates: bool = True) -> ir.Model:
    model = graph(rotates)
    assert run([LowerSegmentAttention()], model) == {"LowerSegmentAttention": 1}
    return model


@pytest.mark.parametrize("form", [graph, lowered])
@pytest.mark.parametrize("sizes", [[4], [4, 4], [16, 4, 40], [200, 1, 3], [1]], ids=str)
def test_images_of_any_sizes_agree_with_the_spec(sizes, form):
    inputs = feeds(sizes, seed=sum(sizes))
    assert relative_error(outputs_of(form(), inputs), segment_attention(**inputs, heads=HEADS)) <= TOLERANCE


@pytest.mark.parametrize("form", [graph, lowered])
def test_without_tables_nothing_is_rotated(form):
    inputs = feeds([4, 4, 9], seed=2)
    del inputs["cos"], inputs["sin"]
    want = segment_attention(**inputs, cos=None, sin=None, heads=HEADS)
    assert relative_error(outputs_of(form(rotates=False), inputs), want) <= TOLERANCE


def test_one_table_is_refused():
    model = graph()
    model.graph.node(0).replace_input_with(4, None)
    with pytest.raises(UnsupportedModelError, match="has q, k, v and image_start, and cos and sin or neither"):
        add_functions(model)


def test_an_image_sees_nothing_of_its_neighbours():
    inputs = feeds([12, 20, 8], seed=3)
    together = outputs_of(lowered(), inputs)
    own = {name: array[12:32] for name, array in inputs.items()} | {"image_start": np.array([0, 20], np.int32)}
    alone = outputs_of(lowered(), own)
    assert relative_error(together[12:32], alone) <= TOLERANCE


def test_a_graph_without_images_is_left_as_it_is():
    model = lowered()
    assert run([LowerSegmentAttention()], model) == {"LowerSegmentAttention": 0}
