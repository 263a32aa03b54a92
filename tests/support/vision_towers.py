"""Tiny vision towers alone: with transformers' weights, as graphs, and through ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from moevlm.export.backends.onnx_target import OnnxTarget
from moevlm.export.backends.registry import known_targets
from moevlm.export.backends.tensorrt import worker
from moevlm.export.backends.tensorrt.onnx_file import write_onnx
from moevlm.export.backends.tensorrt.passes.plugin import DOMAIN, Programs
from moevlm.export.backends.tensorrt.passes.plugin_attention import PluginCrossAttention, PluginSegmentAttention
from moevlm.export.backends.tensorrt.passes.typed import Typed
from moevlm.export.backends.tensorrt.plan_builder import Job
from moevlm.export.backends.tensorrt.profiles import vision_profiles
from moevlm.export.config import VisionConfig
from moevlm.export.families.base import Family
from moevlm.export.families.binding import bind
from moevlm.export.families.fields import Fields
from moevlm.export.families.shared import Weights
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.trace import trace_vision
from moevlm.export.graph.weights import Constant, Weight
from moevlm.export.model import load
from moevlm.export.modules.vision import vision_tower
from moevlm.export.passes.base import Pass, run
from moevlm.plugins.gpu.compiler import compile_program
from moevlm.runtime.backends.libraries import operators_path, plugin_path
from moevlm.runtime.core.towers import Grid, TileTower, VisionMetadata
from moevlm.runtime.request.images.blocks import block_order
from moevlm.runtime.request.vision_inputs import VisionInputs, pack
from tests.support.plan_graphs import evaluate
from tests.support.plugin_nodes import named


@dataclass(frozen=True)
class TinyTower(ABC):
    """ours: a tower's module with transformers' weights. weights: these, by our names.

    CONFIGURATIONS: options of `of` by name. WIDE: the one with heads as wide as published. PLANNED: of which
    TensorRT-RTX builds a plan. OUT: width of visual tokens. UNPRUNED: matrices that pruning leaves as they are.
    SIZES: of images, in blocks of patches. ROUNDING: the largest relative error of engines on a CPU with integer
    weights.
    """

    ours: nn.Module
    weights: dict[str, Weight]
    metadata: VisionMetadata

    CONFIGURATIONS: ClassVar[Mapping[str, Any]]
    WIDE: ClassVar[str]
    PLANNED: ClassVar[str] = ""
    OUT: ClassVar[int]
    UNPRUNED: ClassVar[frozenset[str]] = frozenset({"patch_embedding.weight", "position_embedding"})
    SIZES: ClassVar[Sequence[tuple[int, int]]] = ((1, 1), (2, 3), (4, 1), (1, 5))
    ROUNDING: ClassVar[float] = 0.05

    @classmethod
    @abstractmethod
    def of(cls, name: str, seed: int = 0) -> Self:
        """One of CONFIGURATIONS with every parameter random."""

    @abstractmethod
    def wanted(self, inputs: VisionInputs) -> np.ndarray:
        """transformers' visual tokens [V, H] of `images`."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Of images, in blocks of patches that a visual token has, where it is a share of these."""
        return self.SIZES

    @property
    def grids(self) -> list[Grid]:
        """Of images, in patches."""
        return [(h * self.metadata.merge_size, w * self.metadata.merge_size) for h, w in self.sizes]

    @property
    def tokens(self) -> list[int]:
        """Visual tokens of each image."""
        return [self.metadata.tokens(grid) for grid in self.grids]

    def images(self) -> VisionInputs:
        """Random images of `sizes`."""
        return random_images(self.metadata, self.grids)


@dataclass(frozen=True)
class TinyTileTower(TinyTower):
    """A tower of images of one size."""

    metadata: TileTower

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        side = self.metadata.side // self.metadata.merge_size
        return [(side, side)] * 3


def filled(modules: Mapping[str, nn.Module], values: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, Weight]:
    """Fill every parameter and saved buffer of transformers' modules in place; what a checkpoint has of them.

    modules: by the prefix of their tensors. values: from a tensor's name and standard normal numbers of its shape.
    """
    on_disk: dict[str, Weight] = {}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensor.copy_(values(name, torch.randn(tensor.shape)))
            on_disk[prefix + name] = Constant(tensor.numpy())
    return on_disk


def bound(
    config: VisionConfig, table: Weights, on_disk: Mapping[str, Weight], spare: Mapping[str, str] | None = None
) -> tuple[nn.Module, dict[str, Weight]]:
    """Our module with the weights that a family's table finds on disk, and these by its names.

    spare: the family's `left_out`.
    """

    class Tower(Family):
        weights: ClassVar = {**table, "decoder.head": "lm_head.weight"}
        left_out: ClassVar = spare or {}
        router_suffix = ""

        def translate(self, fields: Fields) -> Any:
            raise NotImplementedError

    with torch.device("meta"):
        module = vision_tower(config).eval()
    shapes = {f"vision.{name}": tuple(p.shape) for name, p in module.named_parameters()}
    head = {"lm_head.weight": Constant(np.zeros((1, 1), np.float32))}
    found = bind(Tower(), shapes | {"decoder.head": (1, 1)}, {**on_disk, **head})
    weights = {name.removeprefix("vision."): found.weights[name] for name in shapes}
    load(module, weights)
    return module, weights


def random_images(vision: VisionMetadata, grids: Sequence[Grid], seed: int = 1) -> VisionInputs:
    """Random pixels from -1 to 1. grids: of images, in patches."""
    patches = sum(h * w for h, w in grids)
    pixels = 2 * np.random.default_rng(seed).random((patches, vision.patch_width), np.float32) - 1
    return pack(pixels, grids, vision)


@torch.no_grad()
def in_torch(module: nn.Module, inputs: VisionInputs) -> np.ndarray:
    """Visual tokens [V, H] of a tower without deepstack."""
    embeds, deepstack = module(**{name: torch.from_numpy(array) for name, array in inputs.arrays.items()})
    assert deepstack is None
    return embeds.numpy()


def traced(module: nn.Module, weights: Mapping[str, Weight]) -> ir.Model:
    """The graph of a tower, with the bodies of its operators."""
    with torch.device("meta"):
        meta = type(module)(module.config).eval()
    graph = trace_vision(meta, weights)
    add_functions(graph)
    return graph


def in_onnxruntime(graph: ir.Model, inputs: VisionInputs, threads: int = 0) -> np.ndarray:
    """Visual tokens [V, H]. threads: 0 for as many as there are cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(operators_path()))
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    return session.run(None, inputs.arrays)[0]


def lowered(graph: ir.Model, target: str) -> ir.Model:
    """The graph of a CPU's engine."""
    (found,) = known_targets([target], {})
    assert isinstance(found, OnnxTarget)
    graph = found.lower(graph, "vision")
    add_functions(graph)
    return graph


def as_on_gpus(graph: ir.Model, dtype: str, inputs: VisionInputs) -> np.ndarray:
    """Visual tokens [V, H] of the graph that TensorRT gets, evaluated by its operators' references."""
    run((*([] if dtype == "float32" else [Typed(dtype)]), *_plugins(dtype, named)), graph)
    assert not graph.functions
    return evaluate(graph, inputs.arrays)["visual_embeds"]


def assert_builds_a_plan(graph: ir.Model, vision: VisionMetadata, depth: int, folder: Path) -> None:
    """TensorRT-RTX builds an engine of the graph: a plugin in each of its blocks."""
    run((Typed("bfloat16"), *_plugins("bfloat16", lambda op: compile_program(op, (89,)).to_bytes())), graph)
    write_onnx(graph, folder / "vision.onnx")
    job = Job(
        product="tensorrt_rtx",
        onnx=str(folder / "vision.onnx"),
        plan=str(folder / "vision.plan"),
        sms=(89,),
        profiles=vision_profiles(graph, vision, 4095 // vision.unit * vision.unit),
        links=str(folder),
        plugins=str(plugin_path()),
        plugin_layers=sum(node.domain == DOMAIN for node in graph.graph),
    )
    assert job.plugin_layers == depth
    assert worker.run(job, lambda *_: None).file.size == (folder / "vision.plan").stat().st_size


def _plugins(dtype: str, programs: Programs) -> tuple[Pass, ...]:
    return PluginSegmentAttention(dtype, programs), PluginCrossAttention(dtype, programs)


def tiles_of(inputs: VisionInputs, vision: TileTower) -> np.ndarray:
    """Pixels of images of one size, [images, channels, height, width]."""
    rows, columns = block_order([(vision.side, vision.side)], vision.merge_size)
    size, count = vision.patch_size, len(inputs.image_start) - 1
    patches = inputs.pixel_patches.reshape(count, vision.side**2, vision.channels, size, size)
    placed = np.empty((count, vision.side, vision.side, vision.channels, size, size), np.float32)
    placed[:, rows, columns] = patches
    return placed.transpose(0, 3, 1, 4, 2, 5).reshape(count, vision.channels, vision.side * size, -1)
