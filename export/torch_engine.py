"""The engine protocol on the canonical PyTorch modules, so that parity runs them like any other step."""

from dataclasses import dataclass

import numpy as np
import torch

from moevlm.export.model import CanonicalModel
from moevlm.export.modules.ops import recorded_taps
from moevlm.runtime.cancellation import Cancellation
from moevlm.runtime.engine import Step, VisionInputs, VisualFeatures


@dataclass
class TorchCache:
    """Per layer keys and values, [batch, kv_heads, capacity, head_dim] float32."""

    batch: int
    capacity: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]


class TorchEngine:
    """All weights in memory, float32. Nothing interrupts a call.

    taps: of the last forward, by name as in the graph, rows [B * S, ...].
    """

    def __init__(self, model: CanonicalModel) -> None:
        self.config = model.config
        self.taps: dict[str, np.ndarray] = {}
        self.kernel_routes = False
        self._vision, self._decoder = model.materialize()

    @torch.no_grad()
    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> VisualFeatures:  # noqa: ARG002
        embeds, deepstack = self._vision(**{name: torch.from_numpy(array) for name, array in vars(inputs).items()})
        empty = np.zeros((0, *embeds.shape), np.float32)
        return VisualFeatures(embeds.numpy(), empty if deepstack is None else deepstack.numpy())

    def new_cache(self, batch: int, capacity: int) -> TorchCache:
        attention = self.config.decoder.attention
        shape = (batch, attention.kv_heads, capacity, attention.head_dim)
        layers = len(self.config.decoder.feed_forward)
        return TorchCache(batch, capacity, [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)])

    @torch.no_grad()
    def forward(
        self,
        step: Step,
        visual: VisualFeatures | None,
        cache: TorchCache,
        cancellation: Cancellation | None = None,  # noqa: ARG002
    ) -> np.ndarray:
        decoder = self.config.decoder
        visual = visual or VisualFeatures(
            np.zeros((1, decoder.hidden), np.float32), np.zeros((decoder.deepstack, 1, decoder.hidden), np.float32)
        )
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in vars(step).items()}
        with recorded_taps() as taps:
            logits, cache.layers = self._decoder(
                **tensors,
                visual_embeds=torch.from_numpy(visual.embeds),
                deepstack_embeds=torch.from_numpy(visual.deepstack) if decoder.deepstack else None,
                caches=cache.layers,
            )
        self.taps = {name: tensor.numpy() for name, tensor in taps.items()}
        return logits.numpy()

    def close(self) -> None:
        """Nothing to do."""
