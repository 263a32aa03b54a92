"""Canonical PyTorch on pruned weights: what parity holds pruned engines to, where transformers has other weights."""

from dataclasses import replace

import numpy as np

from moevlm.export.model import CanonicalModel
from moevlm.export.oracle import Answer
from moevlm.export.parity_cases import Case, pack
from moevlm.export.passes.prune_2_4 import prunable
from moevlm.export.sparsity import pruned
from moevlm.export.tolerances import GREEDY_TOKENS
from moevlm.export.torch_engine import TorchEngine
from moevlm.runtime.batch import Batch, cache_capacity
from moevlm.runtime.manifest import ModelFacts


def pruned_model(model: CanonicalModel) -> CanonicalModel:
    """The same model with the weights that a pruned engine has, before any other rounding."""
    names = {tower: [str(value.name) for value in prunable(graph)] for tower, graph in model.graphs.items()}
    vision, decoder = (
        {**weights, **{name: pruned(weights[name]) for name in names[tower]}}
        for tower, weights in (("vision", model.vision_weights), ("decoder", model.decoder_weights))
    )
    return replace(model, vision_weights=vision, decoder_weights=decoder)


def answer(engine: TorchEngine, case: Case, facts: ModelFacts) -> Answer:
    """What `Oracle.answer` is for transformers: one case alone, and its greedy tokens."""
    images = pack([case], facts)
    visual = None if images is None else engine.encode(images)
    capacity = cache_capacity(len(case.prompt.ids) + GREEDY_TOKENS, facts.context)
    batch = Batch(engine, facts, [case.prompt], visual, capacity)
    prefill = batch.prefill(every_position=True)
    routing, router_logits = (
        [engine.taps[f"layers.{i}.{name}"] for i in engine.config.moe_layers]
        for name in ("expert_index", "router_logits")
    )
    decode = [prefill[-1]]
    while len(decode) < GREEDY_TOKENS:
        decode += list(batch.decode([int(decode[-1].argmax())]))
    logits = np.stack(decode)
    embeds = np.zeros((0, 0), np.float32) if visual is None else visual.embeds
    deepstack = np.zeros((0, 0, 0), np.float32) if visual is None else visual.deepstack
    return Answer(embeds, deepstack, prefill, logits, logits.argmax(-1), routing, router_logits)
