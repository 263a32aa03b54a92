"""A machine with a GPU, as far as the runtime can tell, and bundles for it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import onnx
import pytest
from safetensors.numpy import save_file

from moevlm.runtime.backends.tensorrt import library as tensorrt_library
from moevlm.runtime.backends.tensorrt import plugin_library
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS, CANDIDATES
from moevlm.runtime.core.states import PAGE_SIZE, output_name
from tests.support.bundles import edit_manifest, rehash
from tests.support.fakes.cuda_driver import Driver
from tests.support.fakes.evaluation import Evaluation, WholeGraph
from tests.support.fakes.tensorrt_runtime import VERSION, fake_module, plan_bytes

TARGET = "rtx:sm86,sm89:fp32"
EXPERTS = "engines/experts-fp32/experts.safetensors"
LIMITS = {
    "max_sequences": 5,
    "max_tokens": 21,
    "max_logits": 6,
    "max_visual": 24,
    "max_patches": 100,
    "max_pages": 24,
    "max_rows": 80,
}


@dataclass
class FakeGpu:
    """driver and trt: the fake modules that are installed."""

    driver: Driver
    trt: ModuleType

    def held(self) -> dict[str, int]:
        """What is not freed: memory, handles, TensorRT's objects; empty if nothing."""
        objects = len(self.trt.alive)
        return self.driver.leaks() | ({"objects": objects} if objects else {})


@contextmanager
def fake_gpu(folder: Path, evaluation: Evaluation = WholeGraph, **options: Any) -> Iterator[FakeGpu]:
    """A GPU and TensorRT-RTX inside of the block. folder: for the cache of kernels and the plugin library.

    evaluation: see `fake_module`. options: of the driver.
    """
    driver = Driver(**options)
    trt = fake_module(driver, evaluation)
    library = folder / "tensorrt_plugin.so"
    library.write_bytes(b"the plugins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.driver", driver)  # type: ignore[arg-type]
        patch.setitem(sys.modules, "tensorrt_rtx", trt)
        patch.setattr(plugin_library, "plugin_path", lambda: library)
        patch.setattr(tensorrt_library, "_loggers", {})
        patch.setattr(tensorrt_library, "_plugins", {})
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield FakeGpu(driver, trt)


def gpu_bundle(bundle: Path, folder: Path, sms: tuple[int, ...] = (86, 89), target: str = TARGET) -> Path:
    """A copy of `bundle`, whose target reference is there, with its graphs as an engine of the fake TensorRT-RTX."""
    copy = Path(shutil.copytree(bundle, folder / "gpu.moevlm"))
    engines = copy / "engines" / target.replace(":", "-").replace(",", "-")
    engines.mkdir(parents=True)
    opened = Bundle.open(bundle)
    reference, model = opened.manifest.engines["reference"], opened.manifest.model
    *vision, decoder = (onnx.load(opened.path(graph)) for graph in reference.graphs)
    experts = _experts_as_inputs(decoder, copy / EXPERTS)
    graphs = folder / "graphs"
    graphs.mkdir()
    onnx.save(decoder, graphs / "decoder.onnx")
    several, columns = LIMITS["max_sequences"], -(-model.context // PAGE_SIZE)
    most = {"tokens": (LIMITS["max_tokens"], several), "sequences": (several, several)}
    most |= {"starts": (several + 1,) * 2, "logits": (LIMITS["max_logits"], several)}
    most |= {"visual": (LIMITS["max_visual"], several), "table": (columns, columns)}
    most |= {"pages": (LIMITS["max_pages"],) * 2, "page": (PAGE_SIZE,) * 2, "rows": (LIMITS["max_rows"],) * 2}
    rows = ["logits_index", 0, 1]
    outputs: dict[str, Any] = {"logits": ("FLOAT", [rows, model.vocabulary])}
    count = min(CANDIDATES, model.vocabulary)
    found = ("FLOAT", [rows, count]), ("INT32", [rows, count]), ("FLOAT", [rows])
    outputs |= zip(CANDIDATE_OUTPUTS, found, strict=True)
    caches = {name: output_name(name) for state in reference.states for name in state.tensors}
    inputs = _inputs(decoder, most, {"page"}, experts)
    plan = plan_bytes(graphs / "decoder.onnx", inputs, outputs, 2, list(sms), caches=caches)
    (engines / "decoder.plan").write_bytes(plan)
    for tower in vision:  # one, or none for a model of text alone
        onnx.save(tower, graphs / "vision.onnx")
        rows = ["pixel_patches", 0, model.tower.merge_size**2]
        if queries := model.tower.queries:
            rows = ["image_start", 0, 1, queries, 1]
        outputs = {"visual_embeds": ("FLOAT", [rows, model.hidden])}
        if model.deepstack:
            outputs["deepstack_embeds"] = "FLOAT", [model.deepstack, rows, model.hidden]
        inputs = _inputs(tower, {"patches": (LIMITS["max_patches"],), "starts": (9,)}, set(), set())
        (engines / "vision.plan").write_bytes(plan_bytes(graphs / "vision.onnx", inputs, outputs, 1, list(sms)))
    limits = LIMITS if vision else LIMITS | dict.fromkeys(("max_visual", "max_patches"), 0)
    paths = {path.stem: path.relative_to(copy).as_posix() for path in engines.glob("*.plan")}
    metadata = {
        "product": "tensorrt_rtx",
        "version": VERSION,
        "sms": list(sms),
        "activations": "float32",
        "experts": EXPERTS,
        **limits,
    }
    for path in (*paths.values(), EXPERTS):
        rehash(copy, path)
    engine: dict[str, Any] = {"vision": "", **paths, "dtype": "float32", "tensorrt": metadata}
    engine |= {"page_size": PAGE_SIZE}
    engine |= {"cost": msgspec.to_builtins(reference.cost), "states": msgspec.to_builtins(reference.states)}
    edit_manifest(copy, lambda manifest: manifest["engines"].update({target: engine}))
    return copy


def _experts_as_inputs(decoder: onnx.ModelProto, path: Path) -> set[str]:
    """Take the experts' weights out of the graph into a safetensors file."""
    names = {name for node in decoder.graph.node if node.op_type == "MoEExperts" for name in node.input[3:]}
    weights = [tensor for tensor in decoder.graph.initializer if tensor.name in names]
    path.parent.mkdir(parents=True)
    save_file({tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in weights}, path)
    for tensor in weights:
        decoder.graph.initializer.remove(tensor)
        decoder.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    assert names
    return names


def _inputs(model: onnx.ModelProto, most: dict[str, tuple[int, ...]], fixed: set[str], weights: set[str]) -> Any:
    """Every input as `plan_bytes` takes it."""
    found = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        shape = [(most[dim][0] if dim in fixed else -1) if isinstance(dim, str) else dim for dim in dims]
        profiles = range(len(next(iter(most.values()))))
        largest = [[most[dim][i] if isinstance(dim, str) else dim for dim in dims] for i in profiles]
        dtype = next(row.tensorrt for row in DTYPES.values() if row.onnx == tensor.elem_type)
        found[value.name] = dtype, shape, None if value.name in weights else largest
    return found
