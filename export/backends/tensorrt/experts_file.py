"""The file of experts' weights, which engines of a bundle share."""

from collections.abc import Iterable, Mapping
from functools import partial

from moevlm.export.backends.base import BuildContext
from moevlm.export.graph.weights import Weight
from moevlm.export.writing.tensors_file import header_of, tensor_bytes, write_tensors
from moevlm.runtime.core.engine_metadata import EngineMetadata


def add_experts(build: BuildContext, path: str, experts: Mapping[str, Weight]) -> None:
    """Write the file at `path`, unless it is there, or in the existing bundle. experts: its tensors by name."""
    existing = build.existing
    if path in build.writer:
        return
    if existing is not None and path in existing.manifest.files:
        build.writer.keep(existing, [path])
        return
    size = len(header_of(experts)) + sum(map(tensor_bytes, experts.values()))
    told = partial(build.progress, f"writing {path}")
    build.writer.add_stream(path, size, lambda file: write_tensors(experts, file, told))


def shared_errors(path: str, engines: Iterable[EngineMetadata]) -> dict[str, float]:
    """`weight_errors` of the engine that wrote this file of experts, which others do not read again."""
    sharing = (engine for engine in engines if engine.tensorrt is not None and engine.tensorrt.experts == path)
    return next((engine.weight_errors for engine in sharing), {})
