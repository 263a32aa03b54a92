"""Canonical PyTorch on the weights that an engine stores: what parity holds it to, where transformers has others."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moevlm.export.backends.tensorrt.expert_formats import expert_form, held_form
from moevlm.export.formats.encoded import as_stored, pruned
from moevlm.export.formats.stored import keeping
from moevlm.export.graph.weights import Weight
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.cases import Case, pack
from moevlm.export.parity.expected import Expected
from moevlm.export.parity.oracle import ReferenceOutput
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.export.passes.prune_2_4 import prunable
from moevlm.runtime.core.engine_metadata import MIXED, EngineMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.visual import HostFeatures


@dataclass(frozen=True)
class Storage:
    """What happened to an engine's weights; the default is nothing.

    sparsity: "2:4" or "". experts, group_size: how a GPU's kernels store the experts, as in ExpertsOp, or MIXED; "" and
    0 if not so. scales: the dtype that the scale of a group that was encoded anew is rounded to.
    """

    sparsity: str = ""
    experts: str = ""
    group_size: int = 0
    scales: str = ""

    @classmethod
    def of(cls, engine: EngineMetadata) -> "Storage":
        """On a CPU activations are rounded like the weights, so there it is no more than pruning."""
        if not engine.sms or not engine.group_size:
            return cls(engine.sparsity)
        return cls(engine.sparsity, engine.dtype, engine.group_size, engine.activations)

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
        usual = storage.experts, storage.group_size
        for names in model.config.expert_matrices:
            both = [weights[name] for name in names]
            form = held_form(*both) if storage.experts == MIXED else usual
            if form is not None:
                exact = keeping(expert_form(*form, storage.scales), *both)
                weights |= {name: as_stored(weights[name], exact) for name in names}
    return replace(model, vision_weights=changed["vision"], decoder_weights=changed["decoder"])


def expected_on(
    model: CanonicalModel,
    metadata: ModelMetadata,
    cases: list[Case],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Expected:
    """The results of canonical PyTorch, its hidden states included. progress: layers done, and their number."""
    engine = TorchEngine(model, lambda notes: [_asked(notes, case, metadata) for case in cases], progress)
    outputs, hidden = zip(*(reference_output(engine, model, case, metadata) for case in cases), strict=True)
    expected = Expected(model, metadata, cases, list(outputs))
    expected.hidden = [np.concatenate(layer) for layer in zip(*hidden, strict=True)]
    return expected


def reference_output(
    engine: Engine, model: CanonicalModel, case: Case, metadata: ModelMetadata
) -> tuple[ReferenceOutput, list[np.ndarray]]:
    """The counterpart of `Oracle.outputs`, for one case alone in one pass; and its hidden states, per layer.

    engine: one with debug outputs.
    """
    visual, logits, outputs = _asked(engine, case, metadata)
    size, sparse, every = len(case.prompt.ids), model.config.moe_layers, range(len(metadata.layers))
    embeds = np.zeros((0, 0), np.float32) if visual is None else visual.embeds
    deepstack = np.zeros((0, 0, 0), np.float32) if visual is None else visual.deepstack
    routing, router_logits, hidden = (
        [outputs[f"layers.{i}.{name}"][:size] for i in layers]
        for name, layers in (("expert_index", sparse), ("router_logits", sparse), ("hidden", every))
    )
    return ReferenceOutput(embeds, deepstack, logits[:size], logits[size:], routing, router_logits), hidden


def _asked(
    engine: Engine, case: Case, metadata: ModelMetadata
) -> tuple[HostFeatures | None, np.ndarray, dict[str, np.ndarray]]:
    """Features of a case's images, logits of all its tokens, and the debug outputs."""
    images = pack([case], metadata)
    visual = [] if images is None else [engine.encode(images)]
    batch = Batch(engine, metadata, [case.whole], visual, BatchLimits.of([case.whole], engine.limits, steps=0))
    return visual[0].to_host() if visual else None, *batch.prefill_outputs()
