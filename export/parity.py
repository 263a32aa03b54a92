"""Every step of the pipeline against transformers, on fresh random prompts: the first that fails is the culprit."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import transformers

from moevlm.export.build import Progress
from moevlm.export.bundle_writer import BundleWriter
from moevlm.export.checkpoint import Checkpoint, require_same_source
from moevlm.export.config import ModelConfig, MoEConfig
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.oracle import Answer, Oracle
from moevlm.export.parity_cases import Case, pack, random_cases
from moevlm.export.parity_report import Check, ParityReport
from moevlm.export.taps import TappedEngine
from moevlm.export.tolerances import CHUNK_TOKENS, GREEDY_TOKENS, TOLERANCES, Tolerance
from moevlm.export.torch_engine import TorchEngine
from moevlm.plugins import reference
from moevlm.runtime.batch import Batch, cache_capacity
from moevlm.runtime.bundle import Bundle
from moevlm.runtime.engine import Engine, VisualFeatures
from moevlm.runtime.loading import load_engine
from moevlm.runtime.manifest import ModelFacts

Array = np.ndarray


def check_parity(
    bundle: str | Path,
    checkpoint: str | Path,
    target_names: Iterable[str] = (),
    *,
    seed: int = 0,
    expert_layout: str = "auto",
    progress: Progress = lambda *_: None,
) -> ParityReport:
    """Compare canonical PyTorch and the engines named (all by default) with transformers; note it in the manifest.

    Raises CheckpointError if the checkpoint is not the bundle's, BundleError for an engine that is absent.
    """
    opened = Bundle.open(bundle)
    names = [opened.engine(name)[0] for name in target_names] or sorted(opened.manifest.engines, reverse=True)
    with Checkpoint.open(checkpoint) as source:
        progress("comparing the checkpoint with the bundle's", 0, 0)
        require_same_source(opened.manifest, source)
        model, facts = CanonicalModel.of(source, expert_layout), opened.manifest.model
        cases = random_cases(facts, source.config, seed)
        progress("running transformers", 0, 0)
        oracle = Oracle(Path(checkpoint), family_for(source.config).router_suffix)
        answers = [oracle.answer(case) for case in cases]
        del oracle
        expected = Expected(model, facts, cases, answers)
        progress("running canonical PyTorch", 0, 0)
        engine = TorchEngine(model)
        checks = list(_check(expected, "canonical PyTorch", engine, engine, TOLERANCES["float32"]))
        del engine
        for name in names:
            progress(f"running {name}", 0, 0)
            tolerance = TOLERANCES[opened.engine(name)[1].dtype]
            tapped = TappedEngine(opened, name, model.config)
            checks += _check(expected, name, load_engine(opened, name), tapped, tolerance)
    report = ParityReport(
        bundle=str(bundle),
        checkpoint=str(checkpoint),
        transformers=transformers.__version__,
        seed=seed,
        prompts=len(cases),
        tokens=sum(len(case.prompt.ids) + GREEDY_TOKENS for case in cases),
        passed=all(check.passed for check in checks),
        checks=checks,
    )
    _note(opened, names, report)
    return report


class Expected:
    """The prompts, what transformers answers to them, joined over the prompts, and the routers' parameters."""

    def __init__(self, model: CanonicalModel, facts: ModelFacts, cases: list[Case], answers: list[Answer]) -> None:
        self.facts, self.config, self.answers = facts, model.config, answers
        self.prompts = [case.prompt for case in cases]
        self.images = pack(cases, facts)
        seen = [answer for answer in answers if len(answer.embeds)]
        self.embeds = np.concatenate([answer.embeds for answer in seen])
        self.deepstack = np.concatenate([answer.deepstack for answer in seen], axis=1)
        self.prefill = np.concatenate([answer.prefill for answer in answers])
        self.decode = np.stack([answer.decode for answer in answers], axis=1)  # [steps, B, vocabulary]
        self.tokens = np.stack([answer.tokens for answer in answers], axis=1)  # [steps, B]
        layers = range(len(answers[0].routing))
        self.routing = [np.concatenate([answer.routing[i] for answer in answers]) for i in layers]
        self.router_logits = [np.concatenate([answer.router_logits[i] for answer in answers]) for i in layers]
        biases = {name: weight for name, weight in model.decoder_weights.items() if name.endswith("correction_bias")}
        self.biases = [
            weight.rows(0, weight.shape[0]) if weight is not None else None
            for weight in (biases.get(f"layers.{i}.feed_forward.correction_bias") for i in model.config.moe_layers)
        ]


def _check(expected: Expected, step: str, engine: Engine, tapped: Any, tolerance: Tolerance) -> Iterator[Check]:
    """All checks of one step. tapped: the same engine, or a copy, with `routing` after a forward."""

    def error(quantity: str, ours: Array, theirs: Array, limit: float) -> Check:
        value = relative_error(ours, theirs)
        return Check(step, quantity, value, limit, value <= limit)

    assert expected.images is not None  # some of the cases have images
    visual = engine.encode(expected.images)
    yield error("image features", visual.embeds, expected.embeds, tolerance.features)
    if expected.deepstack.size:
        yield error("deepstack features", visual.deepstack, expected.deepstack, tolerance.features)
    batch = _batch(expected, engine, visual)
    yield error("prefill logits", batch.prefill(every_position=True), expected.prefill, tolerance.logits)
    batch = _batch(expected, engine, visual)
    yield error("chunked prefill logits", batch.prefill(CHUNK_TOKENS, True), expected.prefill, tolerance.logits)
    steps = np.stack([batch.decode(tokens) for tokens in expected.tokens[:-1]])
    yield error("decode logits", steps, expected.decode[1:], tolerance.logits)
    yield _greedy(expected, step, engine, visual)
    yield _routing(expected, step, tapped, visual, tolerance)


def _batch(expected: Expected, engine: Engine, visual: VisualFeatures) -> Batch:
    longest = max(len(prompt.ids) for prompt in expected.prompts)
    capacity = cache_capacity(longest + GREEDY_TOKENS, expected.facts.context)
    return Batch(engine, expected.facts, expected.prompts, visual, capacity)


def _greedy(expected: Expected, step: str, engine: Engine, visual: VisualFeatures) -> Check:
    batch = _batch(expected, engine, visual)
    tokens = [batch.prefill().argmax(-1)]
    for _ in range(GREEDY_TOKENS - 1):
        tokens.append(batch.decode(tokens[-1]).argmax(-1))
    different = np.argwhere(np.stack(tokens) != expected.tokens)
    note = f"first at token {different[0][0]} of prompt {different[0][1]}" if len(different) else ""
    return Check(step, f"{GREEDY_TOKENS} greedy tokens that differ", float(len(different)), 0, not len(different), note)


def _routing(expected: Expected, step: str, tapped: Any, visual: VisualFeatures, tolerance: Tolerance) -> Check:
    """Counts tokens sent to another set of experts; such a flip passes only at a near tie, and its margin is named."""
    batch = _batch(expected, tapped, visual)
    batch.prefill()
    lengths = batch.lengths
    valid = (np.arange(lengths.max()) < lengths[:, None]).reshape(-1)
    ours = [np.sort(index[valid], -1) for index in tapped.routing]
    flips, margins = 0, [0.0]
    for layer, (mine, theirs) in enumerate(zip(ours, expected.routing, strict=True)):
        rows = np.flatnonzero((mine != np.sort(theirs, -1)).any(-1))
        flips += len(rows)
        margins += [_margin(expected, layer, int(row), mine[row], theirs[row]) for row in rows]
    note = f"of {sum(map(len, ours))}, widest margin {max(margins):.1e}" if flips else f"of {sum(map(len, ours))}"
    return Check(step, "routings that differ", float(flips), 0, max(margins) <= tolerance.near_tie, note)


def _margin(expected: Expected, layer: int, row: int, mine: Array, theirs: Array) -> float:
    """How far apart, in choice score, the experts are that only one side chose."""
    config: ModelConfig = expected.config
    moe = config.decoder.feed_forward[config.moe_layers[layer]]
    assert isinstance(moe, MoEConfig)
    logits, bias = expected.router_logits[layer][row], expected.biases[layer]
    score = reference.SCORING.get(moe.router.scoring, lambda x: x)(logits) + (0 if bias is None else bias)
    lost, gained = np.setdiff1d(theirs, mine), np.setdiff1d(mine, theirs)
    return float(score[lost].max() - score[gained].min())


def relative_error(ours: Array, theirs: Array) -> float:
    """Largest absolute difference over the largest absolute value; infinite for another shape or a non-finite value."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))


def _note(bundle: Bundle, names: list[str], report: ParityReport) -> None:
    """Put the verdict on each engine into the manifest; all other files stay as they are."""
    pytorch = all(check.passed for check in report.checks if check.step not in names)
    results = {}
    for name in names:
        checks = [check for check in report.checks if check.step == name]
        passed = pytorch and all(check.passed for check in checks)
        results[name] = {
            "result": "passed" if passed else "failed",
            "transformers": report.transformers,
            "seed": report.seed,
            "checks": {check.quantity: check.value for check in checks},
        }
    manifest = msgspec.structs.replace(bundle.manifest, parity=bundle.manifest.parity | results)
    with BundleWriter(bundle.directory) as writer:
        writer.keep(bundle)
        writer.commit(manifest)
