"""Canonical PyTorch on the weights that an engine stores: what parity holds it to, where transformers has others."""

from dataclasses import dataclass, replace

import numpy as np

from moevlm.export.gpu_packing import as_stored
from moevlm.export.model import CanonicalModel
from moevlm.export.oracle import Answer
from moevlm.export.parity_cases import Case, pack
from moevlm.export.parity_checks import Expected, hidden_states, taps_of_prompts
from moevlm.export.passes.prune_2_4 import prunable
from moevlm.export.sparsity import pruned
from moevlm.export.torch_engine import TorchEngine
from moevlm.export.weights import Weight
from moevlm.runtime.batch import Batch, cache_capacity
from moevlm.runtime.manifest import EngineFacts, ModelFacts


@dataclass(frozen=True)
class Storage:
    """What happened to an engine's weights; the default is nothing.

    sparsity: "2:4" or "". experts, block: how a GPU's kernels store the experts, as in ExpertsOp; "" and 0 if not so.
    scales: the dtype that a block's scale is rounded to.
    """

    sparsity: str = ""
    experts: str = ""
    block: int = 0
    scales: str = ""

    @classmethod
    def of(cls, engine: EngineFacts) -> "Storage":
        """On a CPU activations are rounded like the weights, so there it is no more than pruning."""
        if engine.tensorrt is None or not engine.block_size:
            return cls(engine.sparsity)
        return cls(engine.sparsity, engine.dtype, engine.block_size, engine.tensorrt.activations)

    @property
    def unrounded(self) -> "Storage":
        """The same but for the experts."""
        return Storage(self.sparsity)


def stored_model(model: CanonicalModel, storage: Storage) -> CanonicalModel:
    """The same model with its weights as they are stored."""
    changed: dict[str, dict[str, Weight]] = {
        "vision": dict(model.vision_weights),
        "decoder": dict(model.decoder_weights),
    }
    if storage.sparsity:
        for tower, graph in model.graphs.items():
            weights = changed[tower]
            weights |= {name: pruned(weights[name]) for name in (str(value.name) for value in prunable(graph))}
    if storage.experts:
        weights = changed["decoder"]
        for layer in model.config.moe_layers:
            for name in (f"layers.{layer}.feed_forward.gate_up", f"layers.{layer}.feed_forward.down"):
                weights[name] = as_stored(weights[name], storage.experts, storage.block, storage.scales)
    return replace(model, vision_weights=changed["vision"], decoder_weights=changed["decoder"])


def expected_on(model: CanonicalModel, facts: ModelFacts, cases: list[Case]) -> Expected:
    """What canonical PyTorch answers, its hidden states included."""
    engine = TorchEngine(model)
    expected = Expected(model, facts, cases, [answer(engine, case, facts) for case in cases])
    expected.hidden = hidden_states(expected, taps_of_prompts(expected, engine, engine.encode(expected.images)))
    return expected


def answer(engine: TorchEngine, case: Case, facts: ModelFacts) -> Answer:
    """What `Oracle.answer` is for transformers: one case alone, in one pass."""
    images = pack([case], facts)
    visual = None if images is None else engine.encode(images)
    size, length = len(case.prompt.ids), len(case.whole.ids)
    batch = Batch(engine, facts, [case.whole], visual, cache_capacity(length, facts.context))
    logits = batch.prefill(every_position=True)
    routing, router_logits = (
        [engine.taps[f"layers.{i}.{name}"][:size] for i in engine.config.moe_layers]
        for name in ("expert_index", "router_logits")
    )
    embeds = np.zeros((0, 0), np.float32) if visual is None else visual.embeds
    deepstack = np.zeros((0, 0, 0), np.float32) if visual is None else visual.deepstack
    return Answer(embeds, deepstack, logits[:size], logits[size:], routing, router_logits)
