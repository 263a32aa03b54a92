"""Every step of the pipeline against transformers, on fresh random prompts: the first that fails is the culprit."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import transformers

from moevlm.export.build import Progress
from moevlm.export.bundle_writer import BundleWriter
from moevlm.export.checkpoint import Checkpoint, require_same_source
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.oracle import Oracle
from moevlm.export.parity_cases import Case, random_cases
from moevlm.export.parity_checks import Expected, checks, hidden_states, taps_of_prompts
from moevlm.export.parity_report import Check, ParityReport
from moevlm.export.pruned_reference import answer, pruned_model
from moevlm.export.sparsity import TWO_OF_FOUR
from moevlm.export.taps import TappedEngine
from moevlm.export.tolerances import GREEDY_TOKENS, TOLERANCES
from moevlm.export.torch_engine import TorchEngine
from moevlm.runtime.bundle import Bundle
from moevlm.runtime.errors import BundleError
from moevlm.runtime.loading import load_engine
from moevlm.runtime.manifest import ModelFacts


def check_parity(
    bundle: str | Path,
    checkpoint: str | Path,
    target_names: Iterable[str] = (),
    *,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> ParityReport:
    """Compare canonical PyTorch and the engines named with transformers; note it in the manifest.

    target_names: of engines on the CPU, by default all of them.
    Engines from pruned weights are compared with canonical PyTorch on the same pruned weights.
    Raises CheckpointError if the checkpoint is not the bundle's, BundleError for an engine that is absent or damaged,
    BuildError, before any work, if the manifest cannot be written.
    """
    opened = Bundle.open(bundle)
    engines = opened.manifest.engines
    on_cpu = [name for name, engine in engines.items() if engine.tensorrt is None]
    names = [opened.engine(name)[0] for name in target_names] or sorted(on_cpu, reverse=True)
    if on_gpu := [name for name in names if name not in on_cpu]:
        raise BundleError(
            f"parity reads the inside of engines on the CPU (available: {_listed(on_cpu)}), not {on_gpu[0]}"
        )
    if not names:
        raise BundleError(f"{bundle} has no engine to check (moevlm build {bundle} --checkpoint {checkpoint} adds one)")
    for name in names:
        opened.verify(opened.engine_files(name))
    with BundleWriter(bundle) as writer, Checkpoint.open(checkpoint) as source:
        progress("comparing the checkpoint with the bundle's", 0, 0)
        require_same_source(opened.manifest, source)
        model, facts = CanonicalModel.of(source, opened.manifest.expert_layout), opened.manifest.model
        cases = random_cases(facts, source.config, seed)
        progress("running transformers", 0, 0)
        oracle = Oracle(Path(checkpoint), family_for(source.config).router_suffix)
        answers = [oracle.answer(case) for case in cases]
        del oracle
        expected = Expected(model, facts, cases, answers)
        progress("running canonical PyTorch", 0, 0)
        engine = TorchEngine(model)
        found: list[Check] = list(checks(expected, "canonical PyTorch", engine, engine, TOLERANCES["float32"]))
        expected.hidden = hidden_states(expected, taps_of_prompts(expected, engine, engine.encode(expected.images)))
        del engine
        sparse = [name for name in names if opened.engine(name)[1].sparsity]
        if sparse:
            progress("running canonical PyTorch on pruned weights", 0, 0)
        expected_of = {"": expected} | ({TWO_OF_FOUR: _expected_of_pruned(model, facts, cases)} if sparse else {})
        for name in names:
            progress(f"running {name}", 0, 0)
            entry = opened.engine(name)[1]
            tapped = TappedEngine(opened, name, model.config)
            steps = expected_of[entry.sparsity], name, load_engine(opened, name), tapped, TOLERANCES[entry.dtype]
            found += checks(*steps)
        report = ParityReport(
            bundle=str(bundle),
            checkpoint=str(checkpoint),
            transformers=transformers.__version__,
            seed=seed,
            prompts=len(cases),
            tokens=sum(len(case.prompt.ids) + GREEDY_TOKENS for case in cases),
            passed=all(check.passed for check in found),
            checks=found,
            pruned=tuple(sparse),
        )
        writer.keep(opened)
        writer.commit(msgspec.structs.replace(opened.manifest, parity=_verdicts(opened, names, report)))
    return report


def _expected_of_pruned(model: CanonicalModel, facts: ModelFacts, cases: list[Case]) -> Expected:
    """What canonical PyTorch answers with pruned weights, its hidden states included."""
    pruned = pruned_model(model)
    engine = TorchEngine(pruned)
    expected = Expected(pruned, facts, cases, [answer(engine, case, facts) for case in cases])
    expected.hidden = hidden_states(expected, taps_of_prompts(expected, engine, engine.encode(expected.images)))
    return expected


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _verdicts(bundle: Bundle, names: list[str], report: ParityReport) -> dict[str, Any]:
    """The manifest's parity entries, those of the engines checked now made anew."""
    pytorch = all(check.passed for check in report.checks if check.step not in names)
    results = {}
    for name in names:
        ours = [check for check in report.checks if check.step == name]
        passed = pytorch and all(check.passed for check in ours)
        results[name] = {
            "result": "passed" if passed else "failed",
            "transformers": report.transformers,
            "seed": report.seed,
            "checks": {check.quantity: check.value for check in ours},
            "flip_margins": sorted(flip.margin for check in ours for flip in check.flips),
        }
    return bundle.manifest.parity | results
