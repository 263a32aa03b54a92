"""The canonical ONNX graphs of a model: each tower, on the meta device, traced once; weights bound by name."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from moevlm.export.config import DecoderConfig, VisionConfig
from moevlm.export.graph.translate import Translator
from moevlm.export.graph.weights import Weight
from moevlm.export.modules.decoder import Decoder
from moevlm.runtime.core.states import PagedKV, Recurrent, StateSpec, output_name

Shape = tuple[str | int, ...]
_DTYPES = {"float32": torch.float32, "int64": torch.int64}

Inputs = dict[str, tuple[Shape, torch.dtype]]


def decoder_inputs(decoder: DecoderConfig) -> Inputs:
    """Name, symbolic shape and dtype of every input of the decoder graph, in order."""
    states = decoder.states
    inputs: Inputs = {"input_ids": (("tokens",), torch.int64)}
    if decoder.visual:
        inputs["visual_embeds"] = ("visual", decoder.hidden), torch.float32
    if decoder.deepstack:
        inputs["deepstack_embeds"] = ((decoder.deepstack, "visual", decoder.hidden), torch.float32)
    if decoder.visual:
        inputs["visual_index"] = ("tokens",), torch.int64
    for group, rope in enumerate(decoder.ropes):
        inputs |= {f"rope_{name}.{group}": (("tokens", rope.dim // 2), torch.float32) for name in ("cos", "sin")}
    if states:
        inputs |= {"query_start": (("starts",), torch.int32), "context_len": (("sequences",), torch.int32)}
    if any(isinstance(state, PagedKV) for state in states):
        inputs["page_table"] = (("sequences", "table"), torch.int32)
    if any(layer.mixer.metadata().bidirectional_images for layer in decoder.layers):
        inputs["visible_end"] = (("tokens",), torch.int32)
    if decoder.query_scale is not None:
        inputs["query_scale"] = (("tokens",), torch.float32)
    if any(isinstance(state, Recurrent) for state in states):
        inputs["state_row"] = (("sequences",), torch.int32)
    inputs["logits_index"] = (("logits",), torch.int32)
    for state in states:
        inputs |= _state_inputs(state)
    return inputs


def _state_inputs(state: StateSpec) -> Inputs:
    if isinstance(state, Recurrent):
        return {state.tensor: (("rows", *state.shape), torch.float32)}
    return {name: (("pages", state.kv_heads, "page", width), torch.float32) for name, width in state.widths.items()}


def vision_inputs(vision: VisionConfig) -> Inputs:
    """Name, symbolic shape and dtype of every input of the vision graph, in order."""
    rows: Inputs = {
        name: (("patches", width), _DTYPES[dtype]) for name, (width, dtype) in vision.metadata().inputs.items()
    }
    return rows | {"image_start": (("starts",), torch.int32)}


def trace_vision(module: torch.nn.Module, weights: Mapping[str, Weight]) -> ir.Model:
    """The vision graph, see `runtime.request.vision_inputs.VisionInputs`. weights: by the module's parameter names."""
    config = module.config
    assert isinstance(config, VisionConfig)
    inputs = vision_inputs(config)
    # So many patches are joined to a row, so their number is a multiple of that. Of images there are two, for the trace
    # alone: where they are a dimension, torch would make one image a case of its own.
    unit = config.metadata().unit
    examples, sizes = (
        {"patches": 6 * unit, "starts": 3},
        {"patches": unit * Dim("merged", min=1), "starts": Dim("starts", min=3)},
    )
    arguments = {name: _example(*spec, examples) for name, spec in inputs.items()}
    dynamic = {name: _dynamic(shape, sizes) for name, (shape, _) in inputs.items()}
    outputs = ("visual_embeds", "deepstack_embeds")[: 2 if config.deepstack_layers else 1]
    return _translate("vision", module, arguments, dynamic, inputs, outputs, weights)


def trace_decoder(module: Decoder, weights: Mapping[str, Weight]) -> ir.Model:
    """The decoder graph, see `runtime.engine.step.Step`. weights: by the module's parameter names."""
    inputs = decoder_inputs(module.config)
    # All different and none of them 1, so that no dimension is taken for another or specialised.
    examples = {
        **{"tokens": 5, "visual": 7, "starts": 4, "sequences": 3, "table": 6, "logits": 2},
        **{"pages": 8, "page": 9, "rows": 10},
    }
    sizes = {name: Dim(name, min=1) for name in examples}
    tensors = {name: _example(*spec, examples) for name, spec in inputs.items()}
    open_sizes = {name: _dynamic(shape, sizes) for name, (shape, _) in inputs.items()}
    groups = range(len(module.config.ropes))
    mixers = [layer.mixer.states(i) for i, layer in enumerate(module.config.layers)]

    def nested(values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the module's forward, whose inputs come in the graph's order."""
        names = signature(module.forward).parameters
        return {name: values.get(name) for name in names} | {
            "ropes": [(values[f"rope_cos.{g}"], values[f"rope_sin.{g}"]) for g in groups],
            "states": [tuple(values[name] for state in states for name in _state_inputs(state)) for states in mixers],
        }

    outputs = ("logits", *(output_name(name) for state in module.config.states for name in _state_inputs(state)))
    return _translate("decoder", module, nested(tensors), nested(open_sizes), inputs, outputs, weights)


def _example(shape: Shape, dtype: torch.dtype, sizes: Mapping[str, int]) -> torch.Tensor:
    return torch.empty([sizes[s] if isinstance(s, str) else s for s in shape], dtype=dtype, device="meta")


def _dynamic(shape: Shape, sizes: Mapping[str, Any]) -> dict[int, Any]:
    return {axis: sizes[size] for axis, size in enumerate(shape) if isinstance(size, str)}


def _translate(
    name: str,
    module: torch.nn.Module,
    arguments: dict[str, Any],
    dynamic: dict[str, Any],
    inputs: Mapping[str, tuple[Shape, torch.dtype]],
    outputs: tuple[str, ...],
    weights: Mapping[str, Weight],
) -> ir.Model:
    with torch.no_grad():
        program = torch.export.export(module, (), kwargs=arguments, dynamic_shapes=dynamic, strict=False)
    return Translator(program, weights).model(name, {n: shape for n, (shape, _) in inputs.items()}, outputs)
