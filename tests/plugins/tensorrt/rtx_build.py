"""Builds engines of one node with TensorRT-RTX, in a process of its own: what the library is loaded with stays.

python rtx_build.py <folder>: prints a JSON list with a line for each of CASES: the size of the engine, 0 if there is
none; whether the program is in it; the network's layers, its outputs, and the plugin's errors.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from moevlm.plugins.gpu.program import Program
from moevlm.plugins.gpu.sizes import Sizes, Symbol, Tensor
from moevlm.runtime.backends.libraries import plugin_path
from moevlm.runtime.core.names import PLUGINS
from tests.plugins.tensorrt.programs import LARGEST, MAX_TOKENS, attention_program, experts_program, router_program

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}
EXPERTS, ROUTER, ATTENTION = experts_program(), router_program((86, 89)), attention_program()
# Program, other number of experts if any, largest sizes, whether the attribute is a tensor.
CASES: list[tuple[Program, int | None, Sizes, bool]] = [
    (ROUTER, None, LARGEST, False),
    (EXPERTS, None, LARGEST, False),
    (EXPERTS, None, {"T": 64}, True),
    (ATTENTION, None, LARGEST, False),
    (EXPERTS, 9, {"T": 64}, False),
    (EXPERTS, None, {"T": MAX_TOKENS + 1}, False),
    (ATTENTION, None, LARGEST | {"N": 65}, False),
]


def load(links: Path) -> Any:
    """TensorRT-RTX with a parser that finds it: under the name libtensorrt_rtx.so, beside the parser itself."""
    spec = find_spec("tensorrt_rtx_libs")
    assert spec is not None and spec.submodule_search_locations is not None
    (core,) = Path(spec.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*")
    (parser,) = core.parent.glob("libtensorrt_onnxparser_rtx.so.*")
    for name, path in ((core.name, core), ("libtensorrt_rtx.so", core), (parser.name, parser)):
        (links / name).symlink_to(path)
    for path in (core, parser):
        ctypes.CDLL(str(links / path.name))
    import tensorrt_rtx_bindings

    return tensorrt_rtx_bindings


def model(program: Program, experts: int | None, is_tensor: bool) -> bytes:
    """One node of the program's op, which is also a function, as in an exported graph. The inputs are the graph's."""
    data = program.to_bytes()
    value = helper.make_tensor("program", TensorProto.INT8, [len(data)], data, raw=True) if is_tensor else data
    inputs, outputs = [t.name for t in program.inputs], [t.name for t in program.outputs]
    node = helper.make_node(program.op, inputs, outputs, domain="moevlm", program=value, top_k=2)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moevlm", 1)]
    # A body that TensorRT has no layer for: the plugin must win.
    body = [helper.make_node("NonZero", [inputs[0]], [name]) for name in outputs]
    function = helper.make_function("moevlm", program.op, inputs, outputs, body, opsets[:1], ["program", "top_k"])

    def infos(tensors: tuple[Tensor, ...]) -> list[onnx.ValueInfoProto]:
        other = {EXPERTS.inputs[3].shape[0]: experts} if experts else {}
        return [
            helper.make_tensor_value_info(
                t.name, TYPES[t.dtype], [str(n) if isinstance(n, Symbol) else other.get(n, n) for n in t.shape]
            )
            for t in tensors
        ]

    graph = helper.make_graph([node], "graph", infos(program.inputs), infos(program.outputs))
    made = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    return made.SerializeToString()


def main(links: Path) -> None:
    trt = load(links)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and message.startswith(PLUGINS):
                self.messages.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    assert trt.get_plugin_registry().load_library(str(plugin_path())) is not None
    results = []
    for program, experts, most, is_tensor in CASES:
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
        assert parser.parse(model(program, experts, is_tensor)), parser.get_error(0).desc()
        profile = builder.create_optimization_profile()
        for tensor in program.inputs:
            if any(isinstance(dim, Symbol) for dim in tensor.shape):
                largest = tensor.at(most)
                profile.set_shape(tensor.name, tensor.at(dict.fromkeys(most, 1)), largest, largest)
        config = builder.create_builder_config()
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        engine = builder.build_serialized_network(network, config)
        plan = bytes(engine) if engine is not None else b""
        layers = [network.get_layer(i).type.name for i in range(network.num_layers)]
        made = [network.get_output(i) for i in range(network.num_outputs)]
        outputs = [[tensor.name, tensor.dtype.name, list(tensor.shape)] for tensor in made]
        results.append([len(plan), program.to_bytes() in plan, layers, outputs, logger.messages[:]])
        logger.messages.clear()
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
