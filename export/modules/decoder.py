"""The language model: embedding with the image rows merged in, layers of attention and (sparse) feed-forward, head.

Tokens of all sequences are rows, [T, H], everywhere: every projection is one Gemm on the weight as the checkpoint
stores it, and only mixers know of sequences.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moevlm.export.config import DecoderConfig, MLPConfig, MoEConfig
from moevlm.export.modules import gated_delta, mla, ops  # noqa: F401 - the first two register their mixers
from moevlm.export.modules.layers import MLP, MoE, MoEBesideMLP, MoEOfModality, RMSNorm
from moevlm.export.modules.mixers import States, StepTensors, mixer

VisualRows = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Mixer and feed-forward, both added to the residual stream; norms as `export.config.LayerConfig` says."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        layer = config.layers[index]

        def norm(is_there: bool) -> nn.Module:
            return RMSNorm(config.hidden, config.epsilon) if is_there else nn.Identity()

        self.parallel = layer.norms == "parallel"
        self.attention_norm = norm(True)
        self.attention: nn.Module = mixer(config.hidden, layer.mixer, config.epsilon)
        self.attention_post_norm = norm(layer.norms == "sandwich")
        self.feed_forward: MoE | MLP = _feed_forward(config, layer.feed_forward, f"layers.{index}")
        self.feed_forward_norm = norm(not self.parallel and not isinstance(self.feed_forward, MoEBesideMLP))
        self.feed_forward_post_norm = norm(layer.norms == "sandwich")
        self.scale = nn.Parameter(torch.empty(1)) if layer.scaled else None

    def forward(self, x: Tensor, step: StepTensors, states: States) -> tuple[Tensor, States]:
        """x [T, H] and the layer's states -> both behind it."""
        x, normed, states = self.mix(x, step, states)
        return self.feed(x, normed, step.is_image), states

    def mix(self, x: Tensor, step: StepTensors, states: States) -> tuple[Tensor, Tensor, States]:
        """The first half: tokens see those of their sequence.

        x [T, H] -> x with the mixer's output added, the rows [T, H] that the feed-forward takes, and the states.
        """
        normed = self.attention_norm(x)
        y, states = self.attention(normed, step, states)
        x = x + self.attention_post_norm(y)
        return x, normed if self.parallel else self.feed_forward_norm(x), states

    def feed(self, x: Tensor, normed: Tensor, is_image: Tensor | None) -> Tensor:
        """The second half, every token for itself: what `mix` returned -> the residual stream behind the layer.

        is_image: [T, 1] bool, see `StepTensors`.
        """
        sparse = isinstance(self.feed_forward, MoE)
        y = self.feed_forward(normed, is_image) if sparse else self.feed_forward(normed)
        x = x + self.feed_forward_post_norm(y)
        return x if self.scale is None else x * self.scale


def _feed_forward(config: DecoderConfig, layer: MLPConfig | MoEConfig, name: str) -> MoE | MLP:
    if not isinstance(layer, MoEConfig):
        return MLP(config.hidden, layer)
    if layer.image_width:
        return MoEOfModality(config.hidden, layer, name)
    if layer.dense_width:
        return MoEBesideMLP(config.hidden, layer, name, config.epsilon)
    return MoE(config.hidden, layer, name)


class Decoder(nn.Module):
    """One graph for prefill, chunked prefill, decode, and any mixture of them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.hidden))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(len(config.layers)))
        self.norm = RMSNorm(config.hidden, config.epsilon)
        self.head = None if config.tied_head else nn.Parameter(torch.empty(config.vocabulary, config.hidden))

    def forward(
        self,
        input_ids: Tensor,
        visual_embeds: Tensor | None,
        deepstack_embeds: Tensor | None,
        visual_index: Tensor | None,
        ropes: list[tuple[Tensor, Tensor]],
        query_start: Tensor | None,
        context_len: Tensor | None,
        page_table: Tensor | None,
        visible_end: Tensor | None,
        query_scale: Tensor | None,
        state_row: Tensor | None,
        logits_index: Tensor,
        states: list[States],
    ) -> tuple[Tensor, list[States]]:
        """Shapes and dtypes as `runtime.engine.step.Step`; states: of each layer, those of its mixer's config.

        Returns logits [L, vocabulary] and the states after the step.
        """
        step = StepTensors(
            *(tuple(ropes), query_start, context_len, page_table, state_row, visible_end, query_scale),
            is_image=of_images(input_ids, self.config),
        )
        visual = None if visual_index is None else visual_rows(visual_index)
        x = self.embed(input_ids, visual_embeds, visual)
        updated = []
        for i, (layer, own) in enumerate(zip(self.layers, states, strict=True)):
            x, own = layer(x, step, own)
            x = ops.tap(self.add_deepstack(i, x, deepstack_embeds, visual), f"layers.{i}.hidden")
            updated.append(own)
        return self.logits(x, logits_index), updated

    def embed(self, input_ids: Tensor, visual_embeds: Tensor | None, visual: VisualRows | None) -> Tensor:
        """The residual stream before the first layer."""
        text = F.embedding(input_ids, self.embedding)
        if self.config.embedding_scale != 1.0:
            text = text * self.config.embedding_scale
        if visual is None or visual_embeds is None:
            return text
        row, is_visual = visual
        return torch.where(is_visual, F.embedding(row, visual_embeds), text)

    def add_deepstack(self, i: int, x: Tensor, deepstack_embeds: Tensor | None, visual: VisualRows | None) -> Tensor:
        """Add the image features of layer i: the first layers get another level each (DeepStack)."""
        if deepstack_embeds is None or visual is None or i >= self.config.deepstack:
            return x
        row, is_visual = visual
        return x + torch.where(is_visual, F.embedding(row, deepstack_embeds[i]), 0.0)

    def logits(self, x: Tensor, logits_index: Tensor) -> Tensor:
        """[L, vocabulary] of the rows asked for, from the residual stream behind the last layer."""
        x = self.norm(x.index_select(0, logits_index))
        logits, softcap = F.linear(x, self.embedding if self.head is None else self.head), self.config.logit_softcap
        return torch.tanh(logits / softcap) * softcap if softcap else logits


def of_images(input_ids: Tensor, config: DecoderConfig) -> Tensor | None:
    """[T, 1] bool: which tokens go to the experts for images; None where there are none."""
    found = None
    for token_id in config.image_ids:
        one = input_ids.unsqueeze(-1) == token_id
        found = one if found is None else torch.logical_or(found, one)
    return found


def visual_rows(visual_index: Tensor) -> VisualRows:
    """Per token the row of its visual features, 0 for text, and whether it has one: [T] and [T, 1]."""
    return visual_index.clamp(min=0), (visual_index >= 0).unsqueeze(-1)
