"""What transformers, or canonical PyTorch, computes for parity's prompts, and what an engine shows of its inside."""

from dataclasses import dataclass

import numpy as np

from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.cases import Case, pack
from moevlm.export.parity.oracle import ReferenceOutput
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.visual import VisualFeatures

Array = np.ndarray


@dataclass(frozen=True)
class DebugOutputs:
    """Inner values of one prefill: rows of all prompts' tokens, by name.

    kernel_routes: the experts' indices were not among them, and follow from the router's logits.
    """

    values: dict[str, Array]
    kernel_routes: bool = False


class Expected:
    """The prompts, what transformers answers to them, joined over the prompts, and the routers' parameters.

    hidden: per layer [tokens, H], of canonical PyTorch; empty until that step itself has been checked.
    """

    def __init__(
        self, model: CanonicalModel, metadata: ModelMetadata, cases: list[Case], answers: list[ReferenceOutput]
    ) -> None:
        self.metadata, self.config, self.cases, self.answers = metadata, model.config, cases, answers
        self.prompts = [case.prompt for case in cases]
        self.images = pack(cases, metadata)  # None for a model of text alone: else some of the cases have images
        seen = [answer for answer in answers if len(answer.embeds)]
        self.embeds = np.concatenate([answer.embeds for answer in seen] or [np.empty((0, 0))])
        self.deepstack = np.concatenate([answer.deepstack for answer in seen] or [np.empty((0, 0, 0))], axis=1)
        self.prefill = np.concatenate([answer.prefill for answer in answers])
        self.decode = np.stack([answer.decode for answer in answers], axis=1)  # [steps, B, vocabulary]
        self.tokens = np.stack([case.continuation for case in cases], axis=1)  # [steps, B]
        layers = range(len(answers[0].routing))
        self.routing = [np.concatenate([answer.routing[i] for answer in answers]) for i in layers]
        self.router_logits = [np.concatenate([answer.router_logits[i] for answer in answers]) for i in layers]
        found = {name: weight for name, weight in model.decoder_weights.items() if name.endswith("correction_bias")}
        self._biases = {name: weight.rows(0, weight.shape[0]) for name, weight in found.items()}
        ids = np.concatenate([prompt.ids for prompt in self.prompts])
        self.biases = [self.bias(layer, ids) for layer in model.config.moe_layers]
        self.hidden: list[Array] = []

    def bias(self, layer: int, ids: Array) -> Array | None:
        """Of a layer's router, for tokens of these ids [T]: [E], or [T, E] where images have experts of their own."""
        name = f"layers.{layer}.feed_forward"
        text, images = (self._biases.get(f"{name}.{part}correction_bias") for part in ("", "images."))
        if text is None or images is None:
            return text
        return np.where(np.isin(ids, self.config.decoder.image_ids)[:, None], images, text)

    def limits(self, engine: Engine) -> BatchLimits:
        """How the prompts fit into an engine; see `BatchLimits.of`."""
        return BatchLimits.of(self.prompts, engine.limits, len(self.tokens))

    def encode(self, engine: Engine) -> list[VisualFeatures]:
        """The features of all images, from one call; none for a model of text alone."""
        return [] if self.images is None else [engine.encode(self.images)]

    def batch(self, engine: Engine, visual: list[VisualFeatures], limits: BatchLimits) -> Batch:
        """All prompts in a new pool."""
        return Batch(engine, self.metadata, self.prompts, visual, limits)
