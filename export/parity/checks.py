"""What is compared in one step of the pipeline, in the order in which values arise."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.export.parity.cases import pack
from moevlm.export.parity.expected import DebugOutputs, Expected
from moevlm.export.parity.flip_margin import flip_margin
from moevlm.export.parity.measures import kl_divergences, relative_error, rms_error
from moevlm.export.parity.report import Check, Flip
from moevlm.export.parity.tolerances import (
    ALONE_STEPS,
    CHUNK_TOKENS,
    ROUNDING,
    PlanTolerance,
    Tolerance,
)
from moevlm.plugins.ops.router import choice_scores
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.visual import VisualFeatures

Array = np.ndarray


def checks(
    expected: Expected,
    step: str,
    engine: Engine,
    inside: DebugOutputs | None,
    tolerance: Tolerance | PlanTolerance,
) -> Iterator[Check]:
    """All checks of one step. inside: of the same engine, or a copy; None leaves out routing and hidden states."""
    limits = expected.limits(engine)
    measure = relative_error if isinstance(tolerance, Tolerance) else rms_error

    def error(quantity: str, ours: Array, theirs: Array) -> Check:
        value = measure(ours, theirs)
        return Check(step, quantity, value, tolerance.features, value <= tolerance.features)

    def logits(run: Run) -> Iterator[Check]:
        ours, theirs, note = run.ours, run.theirs, run.note
        if isinstance(tolerance, Tolerance):
            value = relative_error(ours, theirs)
            yield Check(step, run.logits, value, tolerance.logits, value <= tolerance.logits, note)
            return
        found = kl_divergences(ours, theirs)
        value, same = float(found.mean()), ours.argmax(-1) == theirs.argmax(-1)
        first = f"first choice differs in {1 - same.mean():.1%}"
        note = f"{first}, {note}" if note else first
        yield Check(step, run.divergence, value, tolerance.kl, value <= tolerance.kl, note)
        value, limit = float(np.quantile(found, 0.75)), tolerance.usual_kl
        yield Check(step, f"{run.divergence}, 3 of 4 positions", value, limit, value <= limit)

    visual = expected.encode(engine)
    for values in (features.to_host() for features in visual):
        yield error("image features", values.embeds, expected.embeds)
        if expected.deepstack.size:
            yield error("deepstack features", values.deepstack, expected.deepstack)
    if inside is not None:
        assert isinstance(tolerance, Tolerance)
        if expected.routing:
            yield _routing(expected, step, inside, tolerance)
        if expected.hidden:
            yield _hidden(expected, step, inside, tolerance.features)
    choices = FirstChoices()
    for run in runs(expected, engine, visual, limits):
        yield from logits(run)
        if run.way in ("prefill", "decode"):
            choices.add(run.ours, run.theirs)
    if isinstance(tolerance, Tolerance):
        yield choices.check(step, tolerance.logits)


ALONE = "each prompt alone"


@dataclass(frozen=True)
class Run:
    """Logits from one way to take the prompts through an engine, and what they should be."""

    way: str
    ours: Array
    theirs: Array
    note: str = ""

    @property
    def logits(self) -> str:
        """The name of the check of all logits."""
        return self.way if self.way == ALONE else f"{self.way} logits"

    @property
    def divergence(self) -> str:
        """The name of the check of what the logits mean."""
        return f"{self.way} KL"


def runs(expected: Expected, engine: Engine, visual: list[VisualFeatures], limits: BatchLimits) -> Iterator[Run]:
    """In one pass, in chunks with what follows step by step beside them, each prompt alone; all known beforehand."""
    batch = expected.batch(engine, visual, limits)
    yield Run("prefill", batch.prefill(every_position=True), expected.prefill)
    batch = expected.batch(engine, visual, limits)
    chunks, steps = batch.mixed(CHUNK_TOKENS, expected.tokens[: limits.steps])
    yield Run("chunked prefill", chunks, expected.prefill)
    note = "" if limits.steps == len(expected.tokens) else f"{limits.steps} steps fit into the context"
    yield Run("decode", steps, expected.decode[: limits.steps], note)
    yield Run(ALONE, *alone(expected, engine, limits))


def ask(expected: Expected, engine: Engine) -> None:
    """All that `debug_outputs` and then `checks` ask of an engine that is to know it beforehand."""
    debug_outputs(expected, engine)
    deque(runs(expected, engine, expected.encode(engine), expected.limits(engine)), maxlen=0)


def rounding_checks(step: str, stored: Expected, unrounded: Expected, experts: str) -> Iterator[Check]:
    """How far rounded experts alone take the answers, whatever runs them. experts: how they are stored."""
    limits, quantity = ROUNDING[experts], "rounded experts KL"
    found = kl_divergences(stored.prefill, unrounded.prefill)
    other = 1 - (stored.prefill.argmax(-1) == unrounded.prefill.argmax(-1)).mean()
    value, note = float(found.mean()), f"{experts} against unrounded: first choice differs in {other:.1%}"
    yield Check(step, quantity, value, limits.kl, value <= limits.kl, note)
    value = float(np.quantile(found, 0.75))
    yield Check(step, f"{quantity}, 3 of 4 positions", value, limits.usual_kl, value <= limits.usual_kl)


def debug_outputs(expected: Expected, engine: Engine, kernel_routes: bool = False) -> DebugOutputs:
    """Every debug output of one prefill, prompt after prompt. engine: one that has some."""
    batch = expected.batch(engine, expected.encode(engine), expected.limits(engine))
    _, values = batch.prefill_outputs()
    return DebugOutputs(values, kernel_routes)


def hidden_states(expected: Expected, inside: DebugOutputs) -> list[Array]:
    """Per layer [tokens, H]: the residual stream behind it."""
    return [inside.values[f"layers.{i}.hidden"] for i in range(len(expected.metadata.layers))]


def _hidden(expected: Expected, step: str, inside: DebugOutputs, limit: float) -> Check:
    """Every layer's against canonical PyTorch's, so that the first that diverges has a name."""
    pairs = zip(hidden_states(expected, inside), expected.hidden, strict=True)
    errors = [relative_error(ours, theirs) for ours, theirs in pairs]
    over = [i for i, error in enumerate(errors) if not error <= limit]
    note = f"first over the limit: layer {over[0]}" if over else ""
    return Check(step, "hidden states", max(errors), limit, not over, note)


def _routing(expected: Expected, step: str, inside: DebugOutputs, tolerance: Tolerance) -> Check:
    """Tokens sent to another set of experts pass only at a near tie; all margins are reported."""
    flips, total = routing_flips(expected, inside.values), sum(map(len, expected.routing))
    widest = max((flip.margin for flip in flips), default=0.0)
    note = f"of {total}" + (", from its logits" if inside.kernel_routes else "")
    if flips:
        median = np.median([flip.margin for flip in flips])
        note += f", first in layer {flips[0].layer}, widest margin {widest:.1e}, median {median:.1e}"
    return Check(step, "routings that differ", float(len(flips)), 0, widest <= tolerance.near_tie, note, flips)


def routing_flips(expected: Expected, outputs: Mapping[str, Array]) -> list[Flip]:
    """Tokens of the prompts that went to another set of experts than in transformers, layer by layer."""
    flips: list[Flip] = []
    for sparse, layer in enumerate(expected.config.moe_layers):
        mine, theirs = np.sort(outputs[f"layers.{layer}.expert_index"], -1), np.sort(expected.routing[sparse], -1)
        rows = [int(row) for row in np.flatnonzero((mine != theirs).any(-1))]
        flips += [Flip(layer, row, _margin(expected, sparse, row, mine[row], theirs[row])) for row in rows]
    return flips


def _margin(expected: Expected, layer: int, row: int, mine: Array, theirs: Array) -> float:
    """The token's distance from a tie, by the scores of transformers, see `flip_margin`.

    Both choices have to follow from them: a router that is read wrongly finds no tie in its own.
    """
    router = expected.config.moe[expected.config.moe_layers[layer]].router
    logits, bias = expected.router_logits[layer], expected.biases[layer]
    own = None if bias is None else np.broadcast_to(bias, logits.shape)[row, None]
    (choice,) = choice_scores(logits[row, None], router, own)
    return max(flip_margin(choice, mine, router), flip_margin(choice, theirs, router))


def alone(expected: Expected, engine: Engine, limits: BatchLimits) -> tuple[Array, Array]:
    """Logits of each of a batch's prompts by itself, its images in a vision call of their own, and of some steps.

    Kernels take other paths for one sequence than for several, and one sequence is what `moevlm run` has.
    """
    ours, theirs, steps = [], [], min(ALONE_STEPS, limits.steps)
    for case, answer in zip(expected.cases, expected.answers, strict=True):
        images = pack([case], expected.metadata)
        visual = [] if images is None else [engine.encode(images)]
        batch = Batch(engine, expected.metadata, [case.prompt], visual, limits)
        ours += [batch.prefill(every_position=True), *(batch.decode([t]) for t in case.continuation[:steps])]
        theirs += [answer.prefill, answer.decode[:steps]]
    return np.concatenate(ours), np.concatenate(theirs)


class FirstChoices:
    """Counts positions whose largest logit is another one than in the reference."""

    def __init__(self) -> None:
        self.positions, self.different, self.widest, self.largest = 0, 0, 0.0, float("inf")

    def add(self, ours: Array, theirs: Array) -> None:
        """Logits [..., vocabulary] of more positions."""
        self.positions += int(np.prod(theirs.shape[:-1]))
        if ours.shape != theirs.shape:
            self.different, self.widest, self.largest = self.positions, float("inf"), 0.0
            return
        chosen = ours.argmax(-1)[..., None]
        gaps = theirs.max(-1) - np.take_along_axis(theirs, chosen, -1)[..., 0]
        self.different += int((chosen[..., 0] != theirs.argmax(-1)).sum())
        self.widest = max(self.widest, float(gaps.max()))
        self.largest = min(self.largest, float(np.abs(theirs).max()))

    def check(self, step: str, limit: float) -> Check:
        """Passes if theirs are as close there as errors of `limit`, relative to the largest logit, allow."""
        note = f"of {self.positions}" + (f", widest gap of logits {self.widest:.1e}" if self.different else "")
        passed = self.widest <= 2 * limit * self.largest
        return Check(step, "first choices that differ", float(self.different), 0, passed, note)
