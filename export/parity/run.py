"""Every step of the pipeline against transformers, on fresh random prompts: the first that fails is the culprit."""

from collections.abc import Iterable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from moevlm.export.checkpoint.directory import Checkpoint, require_same_source
from moevlm.export.families import family_for
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.batch import BatchLimits
from moevlm.export.parity.cases import long_cases, random_cases
from moevlm.export.parity.checks import ask, checks, debug_outputs, hidden_states, rounding_checks
from moevlm.export.parity.debug_engine import DebugEngine
from moevlm.export.parity.expected import Expected
from moevlm.export.parity.needs import Needs
from moevlm.export.parity.oracle import Oracle
from moevlm.export.parity.quantized_checks import Recording, quantized_checks
from moevlm.export.parity.report import Check, Cost, ParityReport, TextReport
from moevlm.export.parity.requests import request_checks
from moevlm.export.parity.stored_reference import Storage, expected_on, stored_model
from moevlm.export.parity.text import Text, measure_text
from moevlm.export.parity.tolerances import EXACT, TEXT_TOKENS, tolerance_of
from moevlm.export.parity.torch_engine import TorchEngine
from moevlm.export.writing.verdicts import note, reserve
from moevlm.runtime.backends.registry import Backends
from moevlm.runtime.backends.selection import runnable, select
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.core.printable import in_shell
from moevlm.runtime.core.progress import Stages
from moevlm.runtime.loading import load_engine
from moevlm.runtime.perf.process_limits import available_memory


def check_parity(
    bundle: str | Path,
    checkpoint: str | Path,
    target_names: Iterable[str] = (),
    *,
    lora: str | Path | None = None,
    seed: int = 0,
    quick: bool = False,
    text: str | Path | None = None,
    max_tokens: int = TEXT_TOKENS,
    progress: Stages = lambda *_: None,
) -> ParityReport:
    """Compare canonical PyTorch and the engines named with transformers; note it in the manifest.

    target_names: by default all engines that run here. Of a TensorRT engine no more than its outputs can be checked.
    lora: the adapter that the bundle has in its weights.
    text: a file whose first `max_tokens` tokens say what each engine's precision costs there; it decides nothing.
    Engines from pruned weights, or with experts that a GPU reads in blocks, are compared with canonical PyTorch on the
    same weights; what rounding the experts costs is a check of its own.
    quick: two prompts and few decode steps; the manifest gets no verdict.
    Raises RequestError, before any work, if there is clearly too little memory; the need is told by `progress`.
    Raises EngineError, before any work, for a package that an engine needs and is not there.
    Raises CheckpointError if the checkpoint is not the bundle's, BundleError for an engine that is absent, damaged or
    for another machine, RequestError for one without room for the prompts, BuildError, before any work, if the manifest
    cannot be written.
    """
    opened = Bundle.open(bundle)
    engines = opened.manifest.engines
    if not engines:
        adding = f"moevlm build {in_shell(bundle)} --checkpoint {in_shell(checkpoint)}"
        raise BundleError(f"{bundle} has no engine to check ({adding} adds one)")
    names, left_out = [select(opened, name)[0] for name in target_names], ""
    if not names:
        names, left_out = runnable(opened)
    if not names:
        select(opened)  # says why none runs here
    backends = Backends()
    for name in names:
        backends.of(engines[name]).require_library(engines[name])
    for name in names:
        opened.verify(opened.engine_files(name))
    limits = [backends.of(engines[name]).limits(opened.manifest.model, engines[name]) for name in names]
    context = min(limit.max_context for limit in limits)
    read = None if text is None else Text.read(Path(text), opened, max_tokens, context)
    if not quick:
        reserve(opened)
    with Checkpoint.open(checkpoint, lora) as source:
        progress("checking that the bundle came from this checkpoint", 0, 0)
        require_same_source(opened.manifest, source)
        manifest, metadata = opened.manifest, opened.manifest.model
        model = CanonicalModel.of(source, manifest.expert_layout, manifest.ignored_config)
        cases = random_cases(metadata, source.config, seed, quick)
        if not quick:
            cases += long_cases(metadata, source.config, seed, context)
        prompts = [case.prompt for case in cases]
        for limit in limits:
            BatchLimits.of(prompts, limit, len(cases[0].continuation))  # refused before any work
        needs = Needs.of(model, cases, opened, names)
        progress(f"parity {needs}", 0, 0)
        needs.require(available_memory())
        progress("comparing requests", 0, 0)
        requests = request_checks(opened, Path(checkpoint), seed, model.family.splitting)
        oracle = Oracle(source, family_for(source.config), metadata.vision)
        answers = oracle.outputs(cases, partial(progress, "running transformers"))
        del oracle
        expected = Expected(model, metadata, cases, answers)
        engine = TorchEngine(model, partial(ask, expected), partial(progress, "running canonical PyTorch"))
        inside = debug_outputs(expected, engine)
        found: list[Check] = [*requests, *checks(expected, "canonical PyTorch", engine, inside, EXACT)]
        expected.hidden = hidden_states(expected, inside)
        del engine
        stored = {name: Storage.of(engines[name]) for name in names}
        expected_of = {Storage(): expected}
        costs: list[Cost] = []
        for name, storage in stored.items():
            for needed in (storage.unrounded, storage):
                if needed not in expected_of:
                    tell = partial(progress, f"running canonical PyTorch on the weights of {name}")
                    expected_of[needed] = expected_on(stored_model(model, needed), metadata, cases, tell)
            progress(f"running {name}", 0, 0)
            if storage.experts:
                found += rounding_checks(name, expected_of[storage], expected_of[storage.unrounded], storage.experts)
            checked, cost = _checks_of_engine(opened, name, expected_of[storage], stored_model(model, storage))
            found += checked
            costs += cost
        report = ParityReport(
            bundle=str(bundle),
            checkpoint=str(checkpoint),
            transformers=transformers.__version__,
            seed=seed,
            prompts=len(cases),
            tokens=sum(len(case.whole.ids) for case in cases),
            passed=all(check.passed for check in found),
            checks=found,
            pruned=tuple(name for name, storage in stored.items() if storage.sparsity),
            rounded=tuple(name for name, storage in stored.items() if storage.experts),
            plans=tuple(name for name in names if engines[name].sms),
            left_out=left_out,
            not_compared=tuple(check.quantity for check in found if not check.compared),
            costs=tuple(costs),
            text=None if read is None else _text_report(opened, names, read, model, progress),
            quick=quick,
        )
    if not quick:
        note(opened, _verdicts(names, report), progress)
    return report


def _checks_of_engine(
    bundle: Bundle, name: str, expected: Expected, model: CanonicalModel
) -> tuple[list[Check], list[Cost]]:
    """model: the canonical one that `expected` is of."""
    entry, inside = bundle.manifest.engines[name], None
    if entry.group_size and not entry.sms:
        with closing(load_engine(bundle, name)) as engine:
            shipped = Recording.of(engine, expected)
        with closing(DebugEngine(bundle, name, expected.config)) as debug:
            recorded = Recording.of(debug, expected)
        return quantized_checks(expected, model, name, entry, shipped, recorded, debug.kernel_routes)
    if not entry.sms:
        with closing(DebugEngine(bundle, name, expected.config)) as debug:
            inside = debug_outputs(expected, debug, debug.kernel_routes)
    with closing(load_engine(bundle, name)) as engine:
        return list(checks(expected, name, engine, inside, tolerance_of(entry))), []


def _text_report(bundle: Bundle, names: list[str], text: Text, model: CanonicalModel, progress: Stages) -> TextReport:
    with ExitStack() as stack:
        engines = {name: stack.enter_context(closing(load_engine(bundle, name))) for name in names}
        return measure_text(text, model, bundle.manifest.model, engines, progress)


def _verdicts(names: list[str], report: ParityReport) -> dict[str, Any]:
    """The manifest's parity entries of the engines that were checked."""
    pytorch = all(check.passed for check in report.checks if check.step not in names)
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        ours = [check for check in report.checks if check.step == name]
        passed = pytorch and all(check.passed for check in ours)
        results[name] = {
            "result": "passed" if passed else "failed",
            "transformers": report.transformers,
            "seed": report.seed,
            "checks": {check.quantity: check.value for check in ours},
        }
        if report.not_compared:
            results[name]["not_compared"] = list(report.not_compared)
        costs = [cost for cost in report.costs if cost.step == name]
        if costs:
            results[name]["costs"] = {cost.quantity: cost.value for cost in costs}
        if name not in report.plans:
            flips = [flip for check in ours for flip in check.flips] + [flip for cost in costs for flip in cost.flips]
            results[name]["flip_margins"] = sorted(flip.margin for flip in flips)
    return results
