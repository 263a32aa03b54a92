"""What a build would do, without reading or writing a weight: from a checkpoint, or from its config.json alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moevlm.export.backends.base import Target
from moevlm.export.backends.registry import counting, known_targets, planned_names, require_effect
from moevlm.export.build import suited, traced
from moevlm.export.checkpoint.directory import CONFIG, Checkpoint, download_hint
from moevlm.export.checkpoint.files import read_json
from moevlm.export.checkpoint.quantized.methods import settings_of
from moevlm.export.checkpoint.request_files import image_patches, request_files
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BuildError, CheckpointError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.progress import Stages, silent


@dataclass(frozen=True)
class PlannedTarget:
    """engine: what the manifest would say; None where the target cannot be built, for the reason `refused`.

    asked: the name that it was asked for by. bytes: of its files. elsewhere: why it must be built on another machine,
    "" where it need not.
    """

    name: str
    asked: str
    engine: EngineMetadata | None = None
    bytes: int = 0
    refused: str = ""
    elsewhere: str = ""


@dataclass(frozen=True)
class Plan:
    """tensors: of the checkpoint, all found in their places; 0 for a config.json alone. notes: as a build has them."""

    model: ModelMetadata
    tensors: int
    targets: tuple[PlannedTarget, ...]
    notes: tuple[str, ...]


def dry_run(
    source: str | Path,
    names: Iterable[str] = (),
    *,
    expert_layout: str = "auto",
    ignored_config: Sequence[str] = (),
    lora: str | Path | None = None,
    progress: Stages = silent,
    **options: Any,
) -> Plan:
    """Trace and lower a model for each target as a build does.

    source: a checkpoint, a folder with config.json alone, or such a file. names: of targets; by default those that
    the backends name. lora, options: as in `export.build.build`. Raises CheckpointError or UnsupportedModelError as a
    build does; what one target cannot do is said in the plan.
    """
    chosen = tuple(names) or planned_names()
    require_effect(chosen, options)
    found = _read(Path(source), expert_layout, ignored_config, lora, progress)
    graphs = traced(found.model, progress)
    planned = []
    for name in dict.fromkeys(chosen):
        progress(f"planning {name}", 0, 0)
        try:
            for target in suited(known_targets([name], counting(name, options)), found.model):
                engine, size = target.rehearse(graphs, found.model.config, found.patches)
                planned.append(PlannedTarget(target.name, name, engine, size, elsewhere=_missing(target)))
        except BuildError as error:
            planned.append(PlannedTarget(name, name, refused=str(error)))
    return Plan(found.model.metadata(), found.tensors, tuple(planned), found.notes)


@dataclass(frozen=True)
class _Source:
    model: CanonicalModel
    tensors: int = 0
    patches: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Absent:
    """A weight of which nothing but its shape is known."""

    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:  # noqa: ARG002
        raise CheckpointError("a dry run reads no weights")


def _missing(target: Target) -> str:
    try:
        target.require_machine()
    except BuildError as error:
        return str(error)
    return ""


def _read(
    source: Path, expert_layout: str, ignored_config: Sequence[str], lora: str | Path | None, progress: Stages
) -> _Source:
    if source.is_file() and source.name == CONFIG:
        source = source.parent
    elif (source / CONFIG).is_file() and any(source.glob("*.safetensors")):
        with Checkpoint.open(source, lora) as checkpoint:
            model = CanonicalModel.of(checkpoint, expert_layout, ignored_config)
            progress("reading the tokenizer", 0, 0)
            texts, splitting = model.config.mark_texts, model.family.splitting
            carried = request_files(source, model.metadata(), texts, splitting)
            patches = image_patches(source, model.metadata())
            notes = (*carried.lacking(model.metadata()), *model.notes, *carried.notes)
            return _Source(model, len(checkpoint.tensors), patches, notes)
    elif not (source / CONFIG).is_file():
        raise CheckpointError(f"no checkpoint and no {CONFIG} at {source}{download_hint(source)}")
    if lora is not None:
        raise CheckpointError(f"an adapter needs the weights that it is for, and {source} has none")
    config = read_json(source, CONFIG)
    method = settings_of(source, config, ignored_config).method
    told = (
        f"the checkpoint is quantized: {method}; sizes are those of one in floats: "
        "a dry run of the whole checkpoint looks at its tensors",
    )
    model = CanonicalModel.of_config(config, Absent, ignored_config)
    return _Source(model, notes=told if method else ())
