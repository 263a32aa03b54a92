"""moevlm::CrossAttention as a TensorRT plugin: the lowered graph, and a real engine of TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from bench.plan_launches import launches
from moevlm.export.backends.tensorrt import worker
from moevlm.export.backends.tensorrt.onnx_file import write_onnx
from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN, Programs
from moevlm.export.backends.tensorrt.passes.plugin_attention import PluginCrossAttention
from moevlm.export.backends.tensorrt.passes.typed import Typed
from moevlm.export.backends.tensorrt.plan_builder import Job
from moevlm.export.backends.tensorrt.profiles import vision_profiles
from moevlm.export.graph.cross_attention import CROSS_ATTENTION
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.base import run
from moevlm.export.passes.pack_projections import PackProjections
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.plugins.gpu.ops.cross_attention import CrossAttentionOp
from moevlm.runtime.backends.libraries import plugin_path
from tests.support.plan_graphs import evaluate
from tests.support.plugin_nodes import named, op_named
from tests.support.resampler import HEADS, WIDTH, Resampler, expected, images, tower

TOLERANCE = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}


def lowered(queries: int, dtype: str, programs: Programs) -> ir.Model:
    model = Resampler(queries).graph()
    typed = () if dtype == "float32" else (Typed(dtype),)
    run((PackProjections(CROSS_ATTENTION), *typed, PluginCrossAttention(dtype, programs)), model)
    assert not model.functions
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lowered_graph_agrees_with_the_canonical_one(dtype: str) -> None:
    model, module = lowered(7, dtype, named), Resampler(7)
    (node,) = (node for node in model.graph if node.domain == DOMAIN)
    assert op_named(node.attributes["program"].value) == CrossAttentionOp(7, HEADS, WIDTH // HEADS, dtype)
    assert [value.producer().op_type for value in node.inputs[:2]] == ["Gemm", "Gemm"]  # k and v are one product
    for sizes in ([16], [1], [4, 1, 40]):
        inputs = images(sizes)
        assert relative_error(evaluate(model, inputs)["tokens"], expected(module, inputs)) < TOLERANCE[dtype]


def test_tensorrt_hands_the_plugin_what_two_products_make(tmp_path: Path) -> None:
    """Of queries, and of keys and values side by side: nothing is copied in between."""
    graph = lowered(40, "bfloat16", lambda op: compile_program(op, (89,)).to_bytes())
    write_onnx(graph, tmp_path / "vision.onnx")
    job = Job(
        product="tensorrt_rtx",
        onnx=str(tmp_path / "vision.onnx"),
        plan=str(tmp_path / "vision.plan"),
        sms=(89,),
        profiles=vision_profiles(graph, tower(40), 4900),
        links=str(tmp_path),
        plugins=str(plugin_path()),
        plugin_layers=1,
    )
    worker.run(job, lambda *_: None)
    for found in launches((tmp_path / "vision.plan").read_bytes()):
        (attention,) = (launch for launch in found if launch.plugin)
        assert attention.plugin == "CrossAttention"
        made_by = {name: launch.kind for launch in found for name in launch.outputs}
        assert [made_by.get(name, name) for name in attention.inputs] == [*["fully_connected"] * 2, "image_start"]
