"""What one token and one patch cost an engine: the bytes of weights it reads, the multiplications it does."""

import math
from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from moevlm.export.graph.cross_attention import CROSS_ATTENTION
from moevlm.export.graph.gated_delta import GATED_DELTA
from moevlm.export.graph.head import head_of
from moevlm.export.graph.moe_functions import EXPERTS
from moevlm.export.graph.op import is_op, node_spec
from moevlm.export.modules.layers import IMAGES
from moevlm.export.modules.vision.base import PER_PATCH
from moevlm.runtime.core.engine_metadata import CostMetadata
from moevlm.runtime.core.towers import VisionMetadata

_LOOKUPS = ("Gather", "GatherBlockQuantized")  # of these, a row is read
_SPARSE = ("MoE", "QMoE", "TRT_MoE", EXPERTS)
_DOWN = 4  # of the inputs of EXPERTS; biases follow


def cost(
    canonical: Mapping[str, ir.Model], lowered: Mapping[str, ir.Model], tower: VisionMetadata | None
) -> CostMetadata:
    """Bytes as the lowered graphs store weights, multiplications as the canonical graphs have them.

    Both by name, vision, if there is one, and decoder. tower: of vision.
    """
    read = _sum(lowered["decoder"], _bytes)
    multiplied = _sum(canonical["decoder"], _multiplied)
    return CostMetadata(
        dense_bytes=read["dense"],
        expert_bytes=read["expert"],
        image_expert_bytes=read["image_expert"],
        head_bytes=read["head"],
        dense_macs=multiplied["dense"],
        expert_macs=multiplied["expert"],
        head_macs=multiplied["head"],
        vision_bytes=_sum(lowered["vision"], _bytes)["dense"] if tower else 0,
        patch_macs=patch_macs(canonical["vision"], tower) if tower else 0,
        patch_pair_macs=_patch_pair_macs(canonical["vision"]) if tower else 0,
        image_macs=_image_macs(canonical["vision"], tower) if tower else 0,
        lookup_bytes=sum(map(_lookup_bytes, lowered.values())),
        state_macs=sum(node_spec(node).state_macs for node in canonical["decoder"].graph if is_op(node, GATED_DELTA)),
    )


def _sum(model: ir.Model, measure: Callable[[ir.Value], int]) -> dict[str, int]:
    """Of the large initializers: those of every token, of one expert in each sparse layer, and of the logits.

    Those of experts for images apart from the others.
    """
    totals, head = dict.fromkeys(("dense", "expert", "image_expert", "head"), 0), head_of(model.graph)
    for node in model.graph:
        if node.op_type in _LOOKUPS:
            continue
        sparse = node.op_type in _SPARSE
        weights = [value for value in node.inputs if value is not None and _is_weight(value, sparse)]
        size = sum(measure(value) for value in weights if len(value.shape or ()) > 1)
        if sparse:
            experts = next(value.shape[0] for value in weights if value.shape is not None)
            assert isinstance(experts, int)
            of_images = any(IMAGES in str(value.name) for value in weights)
            totals["image_expert" if of_images else "expert"] += size // experts
        else:
            totals["head" if node is head else "dense"] += size
    return totals


def _lookup_bytes(model: ir.Model) -> int:
    """Of tables, scales of their rows included; one that several nodes look up once."""
    nodes = [node for node in model.graph if node.op_type in _LOOKUPS]
    tables = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    return sum(_bytes(value) for value in tables if value.is_initializer() and len(value.shape or ()) > 1)


def _is_weight(value: ir.Value, sparse: bool) -> bool:
    """Experts' weights may be inputs of the graph, of a fixed shape."""
    return value.is_initializer() or (
        sparse and value.is_graph_input() and value.shape is not None and value.shape.is_static()
    )


def _bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    return _elements(value) * int(value.dtype.bitwidth) // 8


def _multiplied(value: ir.Value) -> int:
    """Elements that a token is multiplied with: all but biases of experts, a row for each."""
    is_bias = any(is_op(node, EXPERTS) and place > _DOWN for node, place in value.uses())
    return 0 if is_bias else _elements(value)


def _elements(value: ir.Value) -> int:
    assert value.shape is not None
    return math.prod(value.shape.numpy())


def patch_macs(vision: ir.Model, tower: VisionMetadata) -> int:
    """Multiplications for each patch: projections, those of visual tokens in parts, and a resampler's queries."""
    total = 0
    for weight in _projections(vision):
        per_patch = str(weight.name).startswith(PER_PATCH)
        total += _elements(weight) if per_patch else token_macs(_elements(weight), tower)
    queries = (node.inputs[0] for node in vision.graph if is_op(node, CROSS_ATTENTION))
    return total + sum(2 * _elements(q) for q in queries if q is not None)


def token_macs(elements: int, tower: VisionMetadata) -> int:
    """A patch's part of the multiplications by a weight for visual tokens; none of those that every image has."""
    return 0 if tower.queries else math.ceil(elements / tower.merge_size**2)


def _image_macs(vision: ir.Model, tower: VisionMetadata) -> int:
    """Multiplications of projections for an image that has as many visual tokens as any other."""
    weights = (weight for weight in _projections(vision) if not str(weight.name).startswith(PER_PATCH))
    return tower.queries * sum(map(_elements, weights))


def _projections(vision: ir.Model) -> Iterator[ir.Value]:
    """Weights of all projections."""
    for node in vision.graph:
        if node.op_type == "Gemm":
            weight = node.inputs[1]
            assert weight is not None
            yield weight


def _patch_pair_macs(vision: ir.Model) -> int:
    """Attention: a query and a key, and a weight and a value, for every patch with every other of its image."""
    total = 0
    for node in vision.graph:
        queries = node.inputs[0] if is_op(node, "SegmentAttention") else None
        if queries is not None and queries.shape is not None:
            width = queries.shape[1]
            assert isinstance(width, int)
            total += 2 * width
    return total
