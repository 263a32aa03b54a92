"""The canonical ONNX graphs of a model: each tower, on the meta device, traced once; weights bound by name."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from moevlm.export.config import DecoderConfig, VisionConfig
from moevlm.export.graph.translate import Translator
from moevlm.export.graph.weights import Weight
from moevlm.export.modules.decoder import Decoder
from moevlm.export.modules.vision import Vision

Shape = tuple[str | int, ...]


def decoder_inputs(decoder: DecoderConfig) -> dict[str, tuple[Shape, torch.dtype]]:
    """Name, symbolic shape and dtype of every input of the decoder graph, in order."""
    attention = decoder.attention
    sequence: Shape = ("batch", "sequence")
    rope: Shape = (*sequence, attention.rotary_dim // 2)
    cache: Shape = ("batch", attention.kv_heads, "capacity", attention.head_dim)
    inputs: dict[str, tuple[Shape, torch.dtype]] = {
        "input_ids": (sequence, torch.int64),
        "visual_embeds": (("visual", decoder.hidden), torch.float32),
    }
    if decoder.deepstack:
        inputs["deepstack_embeds"] = ((decoder.deepstack, "visual", decoder.hidden), torch.float32)
    inputs |= {
        "visual_index": (sequence, torch.int64),
        "rope_cos": (rope, torch.float32),
        "rope_sin": (rope, torch.float32),
        "cache_position": (("batch",), torch.int64),
        "logits_index": (("logits",), torch.int64),
    }
    for i in range(len(decoder.feed_forward)):
        inputs |= {f"key_cache.{i}": (cache, torch.float32), f"value_cache.{i}": (cache, torch.float32)}
    return inputs


def vision_inputs(vision: VisionConfig) -> dict[str, tuple[Shape, torch.dtype]]:
    """Name, symbolic shape and dtype of every input of the vision graph, in order."""
    taps = {"bilinear": 4, "bicubic": 16}[vision.position_resampling]
    return {
        "pixel_patches": (("patches", vision.patch_dim), torch.float32),
        "position_index": (("patches", taps), torch.int64),
        "position_weight": (("patches", taps), torch.float32),
        "rope_cos": (("patches", vision.head_dim // 2), torch.float32),
        "rope_sin": (("patches", vision.head_dim // 2), torch.float32),
        "segment_id": (("patches",), torch.int64),
    }


def trace_vision(module: Vision, weights: Mapping[str, Weight]) -> ir.Model:
    """The vision graph, see `runtime.engine.protocol.VisionInputs`. weights: by the module's parameter names."""
    inputs = vision_inputs(module.config)
    # The merger joins merge**2 patches to a row, so the number of patches is a multiple of that.
    patches = module.config.merge_size**2 * Dim("merged", min=1)
    arguments = {name: _example(*spec, {"patches": 6 * module.config.merge_size**2}) for name, spec in inputs.items()}
    dynamic = {name: {0: patches} for name in inputs}
    outputs = ("visual_embeds", "deepstack_embeds")[: 2 if module.config.deepstack_layers else 1]
    return _translate("vision", module, arguments, dynamic, inputs, outputs, weights)


def trace_decoder(module: Decoder, weights: Mapping[str, Weight]) -> ir.Model:
    """The decoder graph, see `runtime.engine.protocol.Step`. weights: by the module's parameter names."""
    inputs = decoder_inputs(module.config)
    layers = len(module.layers)
    # All different and none of them 1, so that no dimension is taken for another or specialised.
    examples = {"batch": 2, "sequence": 5, "visual": 7, "logits": 3, "capacity": 16}
    sizes = {name: Dim(name, min=1) for name in examples}
    arguments: dict[str, Any] = {}
    dynamic: dict[str, Any] = {}
    for name, (shape, dtype) in inputs.items():
        if "_cache." not in name:
            arguments[name] = _example(shape, dtype, examples)
            dynamic[name] = _dynamic(shape, sizes)
    arguments.setdefault("deepstack_embeds", None)
    dynamic.setdefault("deepstack_embeds", None)
    key = inputs["key_cache.0"]
    arguments["caches"] = [(_example(*key, examples), _example(*key, examples)) for _ in range(layers)]
    dynamic["caches"] = [(_dynamic(key[0], sizes),) * 2 for _ in range(layers)]
    outputs = ("logits", *(f"{kind}_cache_out.{i}" for i in range(layers) for kind in ("key", "value")))
    return _translate("decoder", module, arguments, dynamic, inputs, outputs, weights)


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
