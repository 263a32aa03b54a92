"""Checkpoint to bundle: trace once, write the canonical graphs, lower and write one engine per target."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from moevlm.export.backends.base import BuildContext, Target
from moevlm.export.backends.ort.target import REFERENCE
from moevlm.export.backends.registry import target_names as all_names
from moevlm.export.backends.registry import targets
from moevlm.export.checkpoint.directory import Checkpoint, require_same_files, require_same_source
from moevlm.export.checkpoint.request_files import image_patches, request_files
from moevlm.export.config import ModelConfig
from moevlm.export.families import Family
from moevlm.export.graph.functions import add_functions
from moevlm.export.model import CanonicalModel
from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.export.writing.destination import locked, require_new
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BuildError, FieldError
from moevlm.runtime.core.manifest import SCHEMA, Manifest, ModelMetadata
from moevlm.runtime.core.printable import recoded_text
from moevlm.runtime.core.progress import Stages, silent

Planned = Callable[[ModelMetadata, Mapping[str, EngineMetadata]], None]
_TOOLS = ("moevlm", "torch", "onnx", "onnx-ir")


def build(
    checkpoint: str | Path,
    destination: str | Path,
    target_names: Iterable[str] = (),
    *,
    expert_layout: str = "auto",
    ignored_config: Sequence[str] = (),
    lora: str | Path | None = None,
    replace: bool = False,
    progress: Stages = silent,
    note: Callable[[str], None] = silent,
    planned: Planned = silent,
    **options: Any,
) -> Bundle:
    """Write a bundle with the canonical graphs and one engine per target; without targets, the graphs' structure.

    expert_layout: "auto", "out_in" or "in_out", see `families.experts`. ignored_config: dotted names of fields of
    config.json to be left out of account, though what they mean is not known. lora: a folder with an adapter, as PEFT
    saves it, to be merged into the weights. replace: whether a bundle at the
    destination may be replaced. note: called with each thing that the user should know of the checkpoint, in a line.
    planned: called before anything is built with what the manifest will say of the model and of engines on GPUs.
    options: of the backends, by the names of their fields: `backends.ort.options.Options` and so on.
    Memory stays at a few tensors, whatever the checkpoint's size. Raises CheckpointError, UnsupportedModelError or
    BuildError, and leaves nothing behind then.
    """
    chosen = targets(target_names, options)
    require_new(Path(destination), Path(checkpoint), replace)
    with (
        Checkpoint.open(checkpoint, lora) as source,
        locked(Path(destination), progress),
        BundleWriter(destination) as writer,
    ):
        source.start_hashing()
        model = CanonicalModel.of(source, expert_layout, ignored_config)
        chosen = suited(chosen, model)
        progress("reading the tokenizer", 0, 0)
        texts, splitting = model.config.mark_texts, model.family.splitting
        carried = request_files(source.directory, model.metadata(), texts, splitting)
        metadata = msgspec.structs.replace(
            model.metadata(), eos_token_ids=carried.eos_token_ids, image_marks=carried.image_marks
        )
        for text in (*carried.lacking(metadata), *model.notes, *carried.notes):
            note(text)
        for path, data in carried.files.items():
            writer.add_bytes(path, data)
        patches = image_patches(source.directory, metadata)
        _plan(chosen, model, metadata, patches, planned)
        graphs = traced(model, progress)
        if REFERENCE not in chosen:
            for name, graph in graphs.items():
                writer.add_structure(graph, REFERENCE.path(name))
        engines = _build_engines(chosen, BuildContext(writer, graphs, model.config, progress, patches))
        _tell(engines, note)
        progress("hashing the checkpoint", 0, 0)
        source.verify()
        manifest = Manifest(
            schema=SCHEMA,
            model=metadata,
            source=source.fingerprint(),
            files={},
            engines=engines,
            tools={name: version(name) for name in _TOOLS},
            expert_layout=expert_layout,
            ignored_config=tuple(dict.fromkeys(ignored_config)),
            left_out=dict(model.left_out),
            stored_as=dict(model.stored_as),
            template_variables=dict(carried.variables),
        )
        return Bundle.open(writer.commit(manifest))


def add_targets(
    bundle: str | Path,
    checkpoint: str | Path,
    target_names: Iterable[str],
    *,
    lora: str | Path | None = None,
    progress: Stages = silent,
    note: Callable[[str], None] = silent,
    planned: Planned = silent,
    **options: Any,
) -> Bundle:
    """Build further targets, or some again, into an existing bundle from the checkpoint that it came from.

    lora: the adapter that the bundle has in its weights. note: called with what became of weights in codes, a line for
    each engine. planned: as in `build`. Another process that changes the bundle is waited for. Raises CheckpointError
    if the checkpoint is another one, and what `build` raises.
    """
    chosen = targets(target_names, options)
    if not chosen:
        raise BuildError(f"name a target to add (allowed: {', '.join(all_names())})")
    Bundle.open(bundle)
    with ExitStack() as stack:
        stack.enter_context(locked(Path(bundle), progress))
        existing = Bundle.open(bundle)
        source = stack.enter_context(Checkpoint.open(checkpoint, lora))
        require_same_files(existing.manifest, source)
        writer = stack.enter_context(BundleWriter(bundle, changes=existing))
        source.start_hashing()
        model = CanonicalModel.of(source, existing.manifest.expert_layout, existing.manifest.ignored_config)
        chosen = suited(chosen, model)
        patches = image_patches(source.directory, existing.manifest.model)
        _plan(chosen, model, existing.manifest.model, patches, planned)
        graphs = traced(model, progress)
        progress("hashing the checkpoint", 0, 0)
        source.verify()
        require_same_source(existing.manifest, source)
        engines = _build_engines(chosen, BuildContext(writer, graphs, model.config, progress, patches, existing))
        _tell(engines, note)
        writer.keep(existing)
        names = {target.name for target in chosen}
        manifest = msgspec.structs.replace(
            existing.manifest,
            engines=existing.manifest.engines | engines,
            tools={name: version(name) for name in _TOOLS},
            parity={name: result for name, result in existing.manifest.parity.items() if name not in names},
        )
        return Bundle.open(writer.commit(manifest))


def suited(chosen: Iterable[Target], model: CanonicalModel) -> tuple[Target, ...]:
    """The targets as they are built from this checkpoint. Raises BuildError for a size that kernels do not take."""
    found = tuple(target.suited(model.config, model.decoder_weights) for target in chosen)
    for target in found:
        require_sizes(target, model.config, model.family)
    return found


def _plan(
    chosen: Iterable[Target], model: CanonicalModel, metadata: ModelMetadata, patches: int | None, planned: Planned
) -> None:
    engines = {target.name: target.planned(model.config, model.decoder_weights, patches) for target in chosen}
    if found := {name: engine for name, engine in engines.items() if engine is not None}:
        planned(metadata, found)


def _build_engines(chosen: Iterable[Target], context: BuildContext) -> dict[str, EngineMetadata]:
    """Write each target's files. What the manifest says of them, by name."""
    # Where builds have to be the same bytes, reproducible-builds.org's variable stands for the clock.
    clock = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    built = datetime.fromtimestamp(clock, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    known = {} if context.existing is None else dict(context.existing.manifest.engines)
    for target in chosen:
        engine = target.write(replace(context, engines=dict(known)))
        known[target.name] = msgspec.structs.replace(engine, built=built)
    return {target.name: known[target.name] for target in chosen}


def _tell(engines: Mapping[str, EngineMetadata], note: Callable[[str], None]) -> None:
    for name, engine in engines.items():
        if engine.recoded:
            note(f"{name}, weights made of tensors in codes: {recoded_text(engine.recoded, engine.weight_errors)}")


def require_sizes(target: Target, config: ModelConfig, family: Family) -> None:
    """Raise BuildError, by its field of config.json, for a size that the target's kernels do not take."""
    try:
        target.sizes.require(config)
    except FieldError as error:
        told = error.named(family.field_name(error.field))
        raise BuildError(f"{target.name} cannot run this model: {told}") from error


def traced(model: CanonicalModel, progress: Stages) -> dict[str, ir.Model]:
    """The canonical graphs by name, with the bodies of our ops."""
    progress("tracing the model", 0, 0)
    graphs = model.graphs
    for graph in graphs.values():
        add_functions(graph)
    return graphs
