"""A model's weights as an engine of ONNX Runtime stores them: rounded by the same rules, from the checkpoint anew."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from moevlm.export.backends.cpu.passes.head_linear import head_form
from moevlm.export.backends.onnx_target import EMBEDDING, VISION
from moevlm.export.backends.ort.passes.lower_moe import kernel_attributes
from moevlm.export.backends.ort.passes.quantize_experts import shared_scheme
from moevlm.export.formats.base import WeightFormat
from moevlm.export.formats.encoded import as_stored
from moevlm.export.formats.integers import IntFormat
from moevlm.export.formats.ort_packing import block_form
from moevlm.export.formats.registry import int_format
from moevlm.export.formats.stored import cpu_form
from moevlm.export.graph.weights import Weight
from moevlm.export.model import CanonicalModel
from moevlm.export.modules.layers import ExactLinear
from moevlm.export.modules.mla import LatentAttention
from moevlm.runtime.core.engine_metadata import EngineMetadata


def stored_weights(model: CanonicalModel, engine: EngineMetadata) -> tuple[Mapping[str, Weight], Mapping[str, Weight]]:
    """Weights of vision and decoder by parameter name, and `head` where the embedding is the head.

    engine: quantized, on a CPU. Projections and experts have its bits, the embedding and all of vision 8; routers,
    gates of states and of shared experts, norms and biases are as they were.
    """
    ours = bool(engine.operators)
    scales = "float16" if ours else "float32"  # our kernels' scales are halves
    scheme = int_format(engine.dtype, engine.group_size, scales)
    vision, decoder = dict(model.vision_weights), dict(model.decoder_weights)
    for name in _projections(model.vision):
        vision[name] = as_stored(vision[name], _form(replace(VISION, scales=scales), ours, vision[name]))
    for name in _projections(model.decoder):
        decoder[name] = as_stored(decoder[name], _form(scheme, ours, decoder[name]))
    for name in _matrices_of_heads(model.decoder) if ours else ():
        decoder[name] = as_stored(decoder[name], head_form(scheme, decoder[name]))
    for names, moe in model.config.expert_matrices.items():
        if not ours and (moe.expert_scale or moe.image_width or kernel_attributes(moe.expert) is None):
            continue  # `LowerMoE` leaves these experts as they are
        both = [decoder[name] for name in names]
        of_both = cpu_form(scheme, *both) if ours else shared_scheme(scheme, *both)
        assert of_both is not None  # the build would have failed
        for name in names:
            decoder[name] = as_stored(decoder[name], of_both)
    head = decoder.get("head", decoder["embedding"])
    decoder["head"] = as_stored(head, _form(scheme, ours, head))
    decoder["embedding"] = as_stored(decoder["embedding"], EMBEDDING)
    return vision, decoder


def _form(scheme: IntFormat, ours: bool, weight: Weight) -> WeightFormat:
    return cpu_form(scheme, weight) if ours else block_form(scheme, weight)


def _matrices_of_heads(decoder: nn.Module) -> Iterator[str]:
    for name, module in decoder.named_modules():
        if isinstance(module, LatentAttention):
            yield from (f"{name}.{part}" for part in ("key_up", "value_up"))


def _projections(tower: nn.Module) -> Iterator[str]:
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, ExactLinear):
            yield f"{name}.weight"
