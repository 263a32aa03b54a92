"""Rows of the target cpu have the same bits whatever other rows a call has: what ONNX Runtime computes of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from moevlm.export.build import build
from moevlm.runtime.backends.base import EngineOptions
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.loading import load_engine, load_images
from tests.support.checkpoints import ATTENDING
from tests.support.tiny import TinyCheckpoint

SIZES = ((8, 8), (24, 16), (40, 72), (104, 96), (200, 256))  # of images, in pixels


@pytest.fixture(scope="module", params=(*ATTENDING, "gemma4", "kimi_k25", "qwen3_5_moe"))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = TinyCheckpoint(request.param, side_files=True).save(directory / "checkpoint")
    return build(checkpoint, directory / "tiny.moevlm", ["cpu:int8"])


@pytest.mark.parametrize("threads", [2, 31])
def test_images_among_others_are_those_alone(bundle: Bundle, threads: int) -> None:
    """Also where an image has fewer visual tokens than there are threads."""
    images, engine = load_images(bundle), load_engine(bundle, options=EngineOptions(threads=threads))
    assert images is not None
    rng = np.random.default_rng(0)
    fitted = [images.fit(Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)))[0] for size in SIZES]
    alone = [engine.encode(images.pack([image])[0]) for image in fitted]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 1]):
        together = engine.encode(images.pack([fitted[i] for i in order])[0])
        np.testing.assert_array_equal(together.embeds, np.concatenate([alone[i].embeds for i in order]))
        np.testing.assert_array_equal(together.deepstack, np.concatenate([alone[i].deepstack for i in order], axis=1))


# The operators of ONNX Runtime that are left in graphs of the target cpu and compute with floats.
OPERATORS = {
    "Gelu": [("Gelu", ["x"], {"approximate": "none"})],
    "Gelu (tanh)": [("Gelu", ["x"], {"approximate": "tanh"})],
    "SiLU": [("Sigmoid", ["x"], {}), ("Mul", ["x", "y0"], {})],
    "Add": [("Add", ["x", "gain"], {})],
    "Sub": [("Sub", ["x", "gain"], {})],
    "softcap": [("Div", ["x", "gain"], {}), ("Tanh", ["y0"], {}), ("Mul", ["y1", "gain"], {})],
    "LayerNormalization": [("LayerNormalization", ["x", "gain", "gain"], {"axis": -1})],
    "RMSNormalization": [("RMSNormalization", ["x", "gain"], {"axis": -1})],
    "SkipSimplifiedLayerNormalization": [("SkipSimplifiedLayerNormalization", ["x", "x", "gain"], {})],
}


def session(nodes: list[tuple[str, list[str], dict]], gain: np.ndarray) -> onnxruntime.InferenceSession:
    made = [
        helper.make_node(op, inputs, [f"y{i}"], domain="com.microsoft" if op.startswith("Skip") else "", **attributes)
        for i, (op, inputs, attributes) in enumerate(nodes)
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, len(gain)]) for n in ("x", made[-1].output[0])]
    graph = helper.make_graph(made, "g", values[:1], values[1:], [numpy_helper.from_array(gain, "gain")])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_of_onnx_runtime_s_operators(name: str) -> None:
    """Widths that no vector divides, and more values than one thread takes."""
    rng = np.random.default_rng(0)
    for width in (1, 7, 24, 77, 1000, 1537):
        running = session(OPERATORS[name], rng.standard_normal(width).astype(np.float32))
        for count in (7, 311):
            x = rng.standard_normal((count, width)).astype(np.float32) * 3
            (whole,) = running.run(None, {"x": x})
            for start in range(0, count, max(count // 20, 1)):
                for rows in (slice(start, start + 1), slice(start, start + 3)):
                    np.testing.assert_array_equal(running.run(None, {"x": x[rows]})[0], whole[rows])


def test_only_these_operators_are_onnx_runtime_s(bundle: Bundle) -> None:
    """A new one wants a look at whether its rows are independent. The others only move, choose or compare values."""
    _, engine = bundle.engine("cpu:int8")
    found = {
        node.op_type
        for path in (engine.vision, engine.decoder)
        for node in onnx.load(bundle.directory / path, load_external_data=False).graph.node
        if node.domain not in ("moevlm", "moevlm.cpu")
    }
    tested = {op for nodes in OPERATORS.values() for op, _, _ in nodes}
    moving = {
        "Concat",
        "Constant",
        "Gather",
        "GreaterOrEqual",
        "Max",
        "Reshape",
        "Split",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
    # A row of the embedding by itself; some rows of the position table, weighted; the mean of a visual token's patches.
    looking_up = {"GatherBlockQuantized", "ReduceSum", "ReduceMean"}
    assert found <= tested | moving | looking_up
