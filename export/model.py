"""A checkpoint as canonical modules: both towers on the meta device, every parameter bound to its bytes on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.quantized.reader import plain_tensors
from moevlm.export.config import ModelConfig
from moevlm.export.families import Family, family_for
from moevlm.export.families.binding import bind
from moevlm.export.graph.trace import trace_decoder, trace_vision
from moevlm.export.graph.weights import Weight, read
from moevlm.export.modules.decoder import Decoder
from moevlm.export.modules.layers import MoE
from moevlm.export.modules.streaming import set_tensor
from moevlm.export.modules.vision import vision_tower
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.printable import counted, stored_text


@dataclass(frozen=True)
class CanonicalModel:
    """family: that config and names are of. config: the canonical one. vision, decoder: modules on the meta device.

    Without a tower, vision is a module without parameters.

    weights: recipes by parameter name.
    left_out: how many tensors of the checkpoint have no part in a forward pass, by the part of names that they share.
    stored_as: how many weights the checkpoint holds in which format, where it is quantized.
    notes: both for people, in a line each.
    """

    family: Family
    config: ModelConfig
    vision: nn.Module
    decoder: Decoder
    vision_weights: Mapping[str, Weight]
    decoder_weights: Mapping[str, Weight]
    left_out: Mapping[str, int]
    stored_as: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, expert_layout: str = "auto", ignored_config: Sequence[str] = ()
    ) -> "CanonicalModel":
        """Translate config.json and find every tensor; only headers are read, and a tied head that is stored again.

        expert_layout: see `families.experts`. ignored_config: dotted names of fields, see `families.base.Family`.
        Raises UnsupportedModelError for an architecture or field, CheckpointError for a tensor.
        """
        family = family_for(checkpoint.config)
        config = family.config(checkpoint.config, ignored_config)
        vision, decoder = _towers(config)
        parameters = {
            f"{part}.{name}": tuple(parameter.shape)
            for part, module in (("vision", vision), ("decoder", decoder))
            for name, parameter in module.named_parameters()
        }
        updates = checkpoint.adapter.updates if checkpoint.adapter else None
        plain = plain_tensors(checkpoint, ignored_config)
        bound = bind(family, parameters, plain.tensors, expert_layout, plain.ignorable, updates)
        stored_as = plain.counted(bound.used)
        notes = [f"left out {counted(n, 'tensor')} {name}: {bound.why[name]}" for name, n in bound.left_out.items()]
        notes += [f"the checkpoint is quantized: {stored_text(stored_as)}"] if stored_as else []
        vision_weights, decoder_weights = (
            {name.removeprefix(part): weight for name, weight in bound.weights.items() if name.startswith(part)}
            for part in ("vision.", "decoder.")
        )
        weights = vision_weights, decoder_weights
        return cls(family, config, vision, decoder, *weights, bound.left_out, stored_as, tuple(notes))

    @classmethod
    def of_config(
        cls, config: Mapping[str, Any], weight: Callable[[tuple[int, ...]], Weight], ignored_config: Sequence[str] = ()
    ) -> "CanonicalModel":
        """Of config.json alone. weight: a recipe for a parameter of that shape. Raises UnsupportedModelError."""
        family = family_for(config)
        canonical = family.config(config, ignored_config)
        vision, decoder = _towers(canonical)
        recipes = [
            {name: weight(tuple(p.shape)) for name, p in tower.named_parameters()} for tower in (vision, decoder)
        ]
        return cls(family, canonical, vision, decoder, recipes[0], recipes[1], left_out={}, stored_as={})

    @cached_property
    def graphs(self) -> dict[str, ir.Model]:
        """The canonical ONNX graphs, vision, if there is one, and decoder, with lazy initializers."""
        graphs = {"decoder": trace_decoder(self.decoder, self.decoder_weights)}
        if self.config.vision is None:
            return graphs
        return {"vision": trace_vision(self.vision, self.vision_weights), **graphs}

    def metadata(self) -> ModelMetadata:
        """The manifest's metadata of the model: its shapes, its parameters, and those that a token uses."""
        parameters = sum(p.numel() for part in (self.vision, self.decoder) for p in part.parameters())
        idle = sum(moe.idle_parameters for moe in self.decoder.modules() if isinstance(moe, MoE))
        return msgspec.structs.replace(
            self.config.metadata(), parameters=parameters, active_parameters=parameters - idle
        )

    def towers(self) -> tuple[nn.Module, Decoder]:
        """Both modules anew, on the meta device, to be given weights by `load`."""
        return _towers(self.config)


def load(module: nn.Module, weights: Mapping[str, Weight], prefix: str = "") -> None:
    """Read the parameters of a module, float32. weights: by `prefix` and the names that they have in the module."""
    for name, _ in list(module.named_parameters()):
        set_tensor(module, name, torch.from_numpy(read(weights[prefix + name]).astype(np.float32, copy=False)))


def _towers(config: ModelConfig) -> tuple[nn.Module, Decoder]:
    with torch.device("meta"):
        vision = nn.Module() if config.vision is None else vision_tower(config.vision)
        return vision.eval(), Decoder(config.decoder).eval()
