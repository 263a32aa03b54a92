"""What `moevlm build --dry-run` says."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moevlm.runtime.cli.console import table
from moevlm.runtime.cli.memory_text import memory_text
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


def plan_lines(source: Path, plan: "Plan") -> Iterator[str]:
    """The model, a table of targets, the reasons of those that are refused, and what to do next."""
    yield model_text(plan.model)
    if plan.tensors:
        yield f"checkpoint: {plan.tensors:,} tensors, each has its place"
    else:
        yield "no weights here: their names and shapes were not checked"
    for note in plan.notes:
        yield f"note: {note}"
    possible = [(target, target.engine) for target in plan.targets if target.engine is not None]
    if possible:
        yield table("what would be built", _HEADS, [_row(plan.model, *each) for each in possible])
        yield f"read for a token: of weights and cache, at {CONTEXT:,} tokens"
    for target, engine in possible:
        if engine.recoded:
            yield f"{target.name}, weights made of tensors in codes: {recoded_text(engine.recoded)}"
    for target, engine in possible:
        if (report := memory_report(plan.model, engine)) is not None:
            yield memory_text(target.name, report, plan.model)
    for target in plan.targets:
        if target.elsewhere:
            yield f"{target.name} is not to be built here: {target.elsewhere}"
        if target.refused:
            yield f"{target.name} cannot be built: {target.refused}"
    if here := [target.name for target, _ in possible if not target.elsewhere]:
        name = defaults.TARGET if defaults.TARGET in here else here[0]
        yield f"next: moevlm build {in_shell(source) if plan.tensors else 'CHECKPOINT'} -o BUNDLE --target {name}"


def model_text(model: ModelMetadata) -> str:
    """One line of sizes."""
    sparse = [layer for layer in model.layers if layer.experts]
    attention = sum(layer.heads > 0 for layer in model.layers)
    parts = [
        f"{model.parameters / 1e9:.3g} billion parameters, {model.active_parameters / 1e9:.3g} of them for a token"
    ]
    parts.append(
        f"{len(model.layers)} layers" + (f", {attention} with attention" if attention < len(model.layers) else "")
    )
    if sparse:
        parts.append(f"{len(sparse)} sparse: {sparse[0].experts} experts, {sparse[0].top_k} for a token")
    return f"{model.model_type}: {'; '.join(parts)}; context {model.context:,}"


def _row(model: ModelMetadata, target: "PlannedTarget", engine: EngineMetadata) -> tuple[str, ...]:
    paged = cache_bytes_per_token(engine)
    fixed = sum(state.row_bytes for state in engine.states if isinstance(state, Recurrent))
    kept = [f"{bytes_text(paged)} a token"] * any(isinstance(state, PagedKV) for state in engine.states)
    kept += [bytes_text(fixed)] * bool(fixed)
    assert engine.cost is not None
    read = decode_work(model, engine, engine.cost, CONTEXT, 1).bytes
    return target.name, bytes_text(target.bytes), " and ".join(kept), bytes_text(round(read))
