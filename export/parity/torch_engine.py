"""Canonical PyTorch as an engine, with one layer in memory at a time.

What parity asks an engine does not depend on what it answers. So it is asked twice: first the steps are noted; then
each layer takes all of them before the next one is read; then the same calls get their answers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moevlm.export.graph.weights import read
from moevlm.export.model import CanonicalModel, load
from moevlm.export.modules.decoder import Decoder, Layer, of_images, visual_rows
from moevlm.export.modules.mixers import States, StepTensors
from moevlm.export.modules.ops import recorded_taps
from moevlm.export.modules.streaming import release, set_tensor
from moevlm.export.parity.step_notes import PAGE, NotedPool, NotedStep, StepNotes, limits_of
from moevlm.export.parity.torch_images import Images, equal
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.names import CANDIDATES
from moevlm.runtime.core.progress import Progress
from moevlm.runtime.core.states import PagedKV, StateSpec
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.candidates import candidates_of
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import Step, StepOutput
from moevlm.runtime.engine.visual import FeatureRows, HostFeatures
from moevlm.runtime.request.vision_inputs import VisionInputs


class TorchEngine:
    """Canonical PyTorch, float32, for calls that are known.

    ask: makes all the calls that will come, in the same order, of the engine that it is given. Raises EngineError, as
    `forward`, for others. A step has debug outputs where `ask` has looked at them.
    """

    def __init__(
        self, model: CanonicalModel, ask: Callable[[Engine], object], progress: Progress = lambda *_: None
    ) -> None:
        config = model.config.decoder
        self.limits, self.states = limits_of(config), config.states
        vision, self._decoder = model.towers()
        self._images = Images(vision, model)
        notes = StepNotes(config, self._images)
        ask(notes)
        compute(self._decoder, model, notes.pools, progress)
        self._pools = iter(notes.pools)
        self._pool = NotedPool(0, 0)

    def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> HostFeatures:  # noqa: ARG002
        return self._images.encode(inputs)

    def reserve(self, pages: int, rows: int) -> None:
        pool = next(self._pools, None)
        if pool is None or (pool.pages, pool.rows) != (pages, rows):
            raise EngineError(f"nobody announced a pool of {pages} pages and {rows} rows")
        self._pool = pool

    @torch.no_grad()
    def forward(
        self,
        step: Step,
        visual: Sequence[FeatureRows] = (),  # noqa: ARG002
        cancellation: Cancellation | None = None,  # noqa: ARG002
    ) -> StepOutput:
        if not self._pool.steps or not equal(step, self._pool.steps[0].step):
            raise EngineError("nobody announced this step")
        noted = self._pool.steps.pop(0)
        logits = self._decoder.logits(noted.x, torch.from_numpy(step.logits_index)).numpy()
        return StepOutput(candidates_of(logits, CANDIDATES), logits.__getitem__, noted.outputs)

    def close(self) -> None:
        """Nothing to do."""


@torch.no_grad()
def compute(decoder: Decoder, model: CanonicalModel, pools: Sequence[NotedPool], progress: Progress) -> None:
    """Take all steps through all layers. Afterwards the last norm and the head stay in memory."""
    weights, layers = model.decoder_weights, len(decoder.layers)
    steps = [noted for pool in pools for noted in pool.steps]
    set_tensor(decoder, "embedding", torch.from_numpy(read(weights["embedding"])))
    for noted in steps:
        embeds, visual = torch.from_numpy(noted.visual.embeds), visual_rows(torch.from_numpy(noted.step.visual_index))
        noted.x = decoder.embed(torch.from_numpy(noted.step.input_ids), embeds, visual)
    if decoder.head is not None:
        set_tensor(decoder, "embedding", torch.empty_like(decoder.embedding, device="meta"))
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        load(layer, weights, f"layers.{i}.")
        with recorded_taps() as outputs:
            _run_layer(decoder, i, layer, pools, steps)
        start = 0
        for noted in steps:
            rows = slice(start, start + len(noted.x))
            start = rows.stop
            if noted.asked:
                noted.outputs |= {name: values[rows].numpy().copy() for name, values in outputs.items()}
                noted.outputs[f"layers.{i}.hidden"] = noted.x.numpy()
        release(layer)
        progress(i + 1, layers)
    load(decoder.norm, weights, "norm.")
    if decoder.head is not None:
        set_tensor(decoder, "head", torch.from_numpy(read(weights["head"])))


def zeros(states: Sequence[StateSpec], pages: int, rows: int, page: int) -> States:
    """An empty pool of one layer's states, in the order in which its mixer takes them. page: tokens of one."""
    found: list[torch.Tensor] = []
    for state in states:
        if isinstance(state, PagedKV):
            found += [torch.zeros(pages, state.kv_heads, page, width) for width in state.widths.values()]
        else:
            found.append(torch.zeros(rows, *state.shape))
    return tuple(found)


def tensors_of(step: Step) -> StepTensors:
    """What mixers see of a step."""
    ropes = [step.rope[group] for group in sorted(step.rope, key=int)]
    ends, scales = (None if array is None else _tensor(array) for array in (step.visible_end, step.query_scale))
    return StepTensors(
        tuple((_tensor(cos), _tensor(sin)) for cos, sin in ropes),
        _tensor(step.query_start),
        _tensor(step.context_len),
        _tensor(step.page_table),
        _tensor(step.state_row),
        ends,
        scales,
    )


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _run_layer(decoder: Decoder, i: int, layer: Layer, pools: Sequence[NotedPool], steps: Sequence[NotedStep]) -> None:
    specs = decoder.config.layers[i].mixer.states(i)
    recurrent = [n for n, state in enumerate(specs) if not isinstance(state, PagedKV)]
    normed = []
    for pool in pools:
        states = zeros(specs, pool.pages, pool.rows, PAGE)
        for noted in pool.steps:
            for n in recurrent:  # a layer with such a state has no pages, so specs and tensors are one to one
                states[n][list(noted.step.cleared)] = 0
                for source, target in noted.step.row_copies:
                    states[n][target] = states[n][source]
            noted.x, rows, states = layer.mix(noted.x, tensors_of(noted.step), states)
            normed.append(rows)
    # Behind the mixer no token sees another, so each expert is used once for all of them.
    if not steps:
        return
    ids = torch.cat([torch.from_numpy(noted.step.input_ids) for noted in steps])
    fed = layer.feed(torch.cat([noted.x for noted in steps]), torch.cat(normed), of_images(ids, decoder.config))
    for noted, x in zip(steps, fed.split([len(noted.x) for noted in steps]), strict=True):
        deepstack = torch.from_numpy(noted.visual.deepstack) if decoder.config.deepstack else None
        visual = visual_rows(torch.from_numpy(noted.step.visual_index))
        noted.x = decoder.add_deepstack(i, x, deepstack, visual)
