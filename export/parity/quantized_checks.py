"""A quantized engine against canonical PyTorch on the weights that it stores, layer by layer; and what they cost."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from moevlm.export.backends.onnx_target import VISION
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.checks import alone, routing_flips
from moevlm.export.parity.expected import Expected
from moevlm.export.parity.flip_margin import flip_margin
from moevlm.export.parity.layer_reference import Deviation, Rounding, layer_deviations, vision_deviations
from moevlm.export.parity.measures import kl_divergences, relative_error, rms_error
from moevlm.export.parity.recorded_engine import RecordedEngine, RecordedSequence
from moevlm.export.parity.report import Check, Cost
from moevlm.export.parity.stored_weights import stored_weights
from moevlm.export.parity.tolerances import CHUNK_TOKENS, EXACT, QUANTIZED, QuantizedTolerance
from moevlm.plugins.ops.router import choice_scores, route
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.visual import HostFeatures

Array = np.ndarray


@dataclass(frozen=True)
class Recording:
    """An engine's results for the prompts: nothing more is asked of it, and it can be closed.

    prefill, decode: logits of all positions, as in `Expected`. prompts: its sequences then. sequences: those of chunks
    and of each prompt alone, too.
    """

    visual: HostFeatures | None
    prefill: Array
    decode: Array
    prompts: list[RecordedSequence]
    sequences: list[RecordedSequence]

    @classmethod
    def of(cls, engine: Engine, expected: Expected) -> Self:
        """Take the prompts through an engine, in all the ways that are checked."""
        recorded, limits = RecordedEngine(engine), expected.limits(engine)
        visual = expected.encode(recorded)
        batch = expected.batch(recorded, visual, limits)
        prefill = batch.prefill(every_position=True)
        decode = np.stack([batch.decode(tokens) for tokens in expected.tokens[: limits.steps]])
        prompts = recorded.sequences()
        expected.batch(recorded, visual, limits).prefill(CHUNK_TOKENS)
        alone(expected, recorded, limits)
        features = next((one.to_host() for one in visual), None)
        return cls(features, prefill, decode, prompts, recorded.sequences())

    def apart(self, other: "Recording") -> float:
        """The largest relative difference of the logits of the two."""
        pairs = [(self.prefill, other.prefill), (self.decode, other.decode)]
        for mine, theirs in zip(self.sequences, other.sequences, strict=True):
            pairs += [(row, theirs.logits[place]) for place, row in mine.logits.items()]
        return max(relative_error(*pair) for pair in pairs)


def quantized_checks(
    expected: Expected,
    model: CanonicalModel,
    step: str,
    metadata: EngineMetadata,
    shipped: Recording,
    inside: Recording,
    kernel_routes: bool,
    tolerance: QuantizedTolerance = QUANTIZED,
) -> tuple[list[Check], list[Cost]]:
    """All checks of a quantized engine on a CPU, which decide; and how far its answers are from transformers'.

    model: the canonical one that the engine was made of. shipped: of the engine as it is shipped; inside: of the same
    with debug outputs. kernel_routes: its kernels do not show their choice of experts.
    """
    costs = [
        *_costs(step, "prefill", shipped.prefill, expected.prefill),
        *_costs(step, "decode", shipped.decode, expected.decode[: len(shipped.decode)]),
        *_inside(expected, step, inside.prompts),
    ]
    vision, decoder = stored_weights(model, metadata)
    features: list[Deviation] = []
    if expected.images is not None and shipped.visual is not None:
        stored = replace(model, vision_weights=vision)
        features += vision_deviations(stored, expected.images, VISION.group_size, shipped.visual)
    rounding = Rounding.of(metadata)
    rest = list(layer_deviations(model.config, decoder, rounding, inside.sequences))
    apart, limit = shipped.apart(inside), EXACT.logits
    found = [
        *(_overall(step, kind, features, kind, tolerance) for kind in ("image features", "deepstack features")),
        Check(
            step,
            "logits with debug outputs",
            apart,
            limit,
            apart <= limit,
            "as shipped, against the graph with debug outputs",
        ),
        _own_choices(expected, step, inside.sequences, kernel_routes, tolerance),
        *(_overall(step, f"{kind}s, one by one", rest, kind, tolerance) for kind in ("router", "layer")),
        _single_tokens(step, [*features, *rest], tolerance),
        _overall(step, "head", rest, "head", tolerance),
    ]
    return [check for check in found if check is not None], costs


def _overall(
    step: str, quantity: str, deviations: Iterable[Deviation], kind: str, tolerance: QuantizedTolerance
) -> Check | None:
    """The largest error of those of a kind, in units of what rounding activations explains; None if there are none."""
    some = [deviation for deviation in deviations if deviation.name.startswith(kind)]
    if not some:
        return None
    worst = max(some, key=lambda deviation: deviation.overall)
    over = next((d.name for d in some if not d.overall <= tolerance.rounding), "")
    note = f"first over the limit: {over}" if over else f"{worst.relative:.1%} of {worst.name}"
    return Check(step, quantity, worst.overall, tolerance.rounding, not over, note)


def _single_tokens(step: str, deviations: list[Deviation], tolerance: QuantizedTolerance) -> Check:
    worst = max(deviations, key=lambda deviation: deviation.worst_row)
    passed = all(deviation.worst_row <= tolerance.row for deviation in deviations)
    return Check(step, "worst single token", worst.worst_row, tolerance.row, passed, f"in {worst.name}")


def _own_choices(
    expected: Expected, step: str, sequences: list[RecordedSequence], kernel_routes: bool, tolerance: QuantizedTolerance
) -> Check | None:
    """Experts that do not follow from the engine's own router logits: its router computes float32, as the spec does.

    None for a model without experts.
    """
    if not expected.routing:
        return None
    quantity, total, used, different, widest = "choices unlike its router logits", 0, 0, 0, 0.0
    for layer in expected.config.moe_layers:
        spec = expected.config.moe[layer].router
        logits, chosen, ids = (
            np.concatenate([sequence.values[name] for sequence in sequences])
            for name in (f"layers.{layer}.router_logits", f"layers.{layer}.expert_index", "input_ids")
        )
        bias = expected.bias(layer, ids)
        choice, best = choice_scores(logits, spec, bias), route(logits, spec, bias)[0]
        rows = np.flatnonzero((np.sort(chosen, -1) != np.sort(best, -1)).any(-1))
        total, used, different = total + len(chosen), used + len(np.unique(chosen)), different + len(rows)
        widest = max([widest, *(flip_margin(choice[row], chosen[row], spec) for row in rows)])
    experts = sum(layer.experts for layer in expected.config.moe.values())
    note = f"of {total}, which reach {used} of {experts} experts"
    if kernel_routes:  # its choice is made up from its logits; layers show whether it computed with these
        note += "; chosen inside its kernel: see layers"
    elif different:
        note += f", widest margin {widest:.1e}"
    return Check(step, quantity, float(different), 0, widest <= tolerance.near_tie, note)


def _costs(step: str, what: str, ours: Array, theirs: Array) -> Iterator[Cost]:
    different = (ours.argmax(-1) != theirs.argmax(-1)).mean()
    yield Cost(
        step, f"{what} KL", float(kl_divergences(ours, theirs).mean()), f"first choice differs in {different:.1%}"
    )


def _inside(expected: Expected, step: str, sequences: list[RecordedSequence]) -> Iterator[Cost]:
    """Compare routing and last hidden states of the prompts with transformers. sequences: those of the prompts."""
    taps = {
        name: np.concatenate([s.values[name][: len(p.ids)] for s, p in zip(sequences, expected.prompts, strict=True)])
        for name in sequences[0].values
    }
    if expected.routing:
        yield _routing(expected, step, taps)
    last = f"layers.{len(expected.metadata.layers) - 1}.hidden"
    yield Cost(step, "last hidden states", rms_error(taps[last], expected.hidden[-1]))


def _routing(expected: Expected, step: str, taps: Mapping[str, Array]) -> Cost:
    flips, note = routing_flips(expected, taps), ""
    if flips:
        margins = [flip.margin for flip in flips]
        note = f"widest margin {max(margins):.1e}, median {np.median(margins):.1e}"
    share = len(flips) / sum(map(len, expected.routing))
    return Cost(step, "share of routings that differ", share, note, flips)
