"""What `moevlm build --dry-run` says."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moevlm.runtime.cli.console import table
from moevlm.runtime.cli.memory_text import memory_text
from moevlm.runtime.cli.model_text import model_rows
from moevlm.runtime.core import defaults
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.printable import bytes_text, in_shell, recoded_text
from moevlm.runtime.core.states import PagedKV, Recurrent
from moevlm.runtime.perf.limits import cache_bytes_per_token, decode_work
from moevlm.runtime.perf.memory import CONTEXT, memory_report

if TYPE_CHECKING:
    from moevlm.export.dry_run import Plan, PlannedTarget

_HEADS = ("target", "on disk", "a sequence keeps", "read for a token")


def plan_lines(source: Path, plan: "Plan", options: Sequence[tuple[str, str]], named: bool) -> Iterator[str]:
    """The model, a table of targets, the reasons of those that are refused, and what to do next.

    options: (target, words) of the build's other options, with the asked name of a target that they count for; "" for
    all. named: whether the targets were asked for; by default one build is suggested, otherwise one of all that can be
    built here.
    """
    found = f"{plan.tensors:,} tensors, each has its place"
    weights = found if plan.tensors else "no weights here: their names and shapes were not checked"
    yield table(str(source), ("", ""), [*model_rows(plan.model), ("checkpoint", weights)], header=False)
    for note in plan.notes:
        yield f"note: {note}"
    possible = [(target, target.engine) for target in plan.targets if target.engine is not None]
    if possible:
        yield "\n" + table("what would be built", _HEADS, [_row(plan.model, *each) for each in possible])
        yield f"read for a token: of weights and cache, at {CONTEXT:,} tokens"
    for target, engine in possible:
        if engine.recoded:
            yield f"{target.name}, weights made of tensors in codes: {recoded_text(engine.recoded)}"
    for target, engine in possible:
        if (report := memory_report(plan.model, engine)) is not None:
            yield "\n" + memory_text(target.name, report, plan.model)
    yield ""
    for target in plan.targets:
        if target.elsewhere:
            yield f"{target.name} can be built, but not on this machine: {target.elsewhere}"
        if target.refused:
            yield f"refused: {target.refused if target.name in target.refused else f'{target.name}: {target.refused}'}"
    if here := list(dict.fromkeys(target.asked for target, _ in possible if not target.elsewhere)):
        chosen = here if named else [defaults.TARGET if defaults.TARGET in here else here[0]]
        words = [f"--target {name}" for name in chosen]
        words += dict.fromkeys(word for name, word in options if name in ("", *chosen))
        place = in_shell(source) if plan.tensors else "CHECKPOINT"
        yield f"next: moevlm build {place} -o BUNDLE {' '.join(words)}"


def _row(model: ModelMetadata, target: "PlannedTarget", engine: EngineMetadata) -> tuple[str, ...]:
    paged = cache_bytes_per_token(engine)
    fixed = sum(state.row_bytes for state in engine.states if isinstance(state, Recurrent))
    kept = [f"{bytes_text(paged)} a token"] * any(isinstance(state, PagedKV) for state in engine.states)
    kept += [bytes_text(fixed)] * bool(fixed)
    assert engine.cost is not None
    read = decode_work(model, engine, engine.cost, CONTEXT, 1).bytes
    return target.name, bytes_text(target.bytes), " and ".join(kept), bytes_text(round(read))
