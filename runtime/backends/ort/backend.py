"""Engines on ONNX Runtime, with this package's operators or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moevlm.runtime.backends.base import EngineOptions, KernelsReport, Table, opened_files
from moevlm.runtime.backends.libraries import DOMAIN, instruction_set, operators_path
from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.backends.ort.library import onnxruntime
from moevlm.runtime.backends.ort.limits import limits_of
from moevlm.runtime.bundle.graph_file import GraphFile
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import EngineError, Misfit, RequestError, shown
from moevlm.runtime.core.experts_in import DEVICE
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.progress import Stages
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import EngineLimits


class OrtBackend:
    """See `Backend`. Its engines run on any machine."""

    machine = ""

    def misfit(self, engine: EngineMetadata) -> Misfit | None:  # noqa: ARG002 - nothing is needed but a CPU
        return None

    def require_library(self, engine: EngineMetadata) -> None:
        onnxruntime()
        operators_for(engine)

    def limits(self, model: ModelMetadata, engine: EngineMetadata) -> EngineLimits:
        return limits_of(model, engine)

    def load(self, bundle: Bundle, name: str, options: EngineOptions, progress: Stages | None = None) -> Engine:
        if options.experts_in != DEVICE:
            raise RequestError(f"experts_in = {options.experts_in} has no effect on {name}: it is for engines on a GPU")
        engine = bundle.manifest.engines[name]
        *vision, decoder = open_graphs(bundle, name, progress)
        return OrtEngine(
            next(iter(vision), None),
            decoder,
            bundle.manifest.model,
            engine,
            options.threads,
            spinning=options.spinning,
            operators=operators_for(engine),
        )

    def problems(self, bundle: Bundle, engine: EngineMetadata) -> list[str]:  # noqa: ARG002 - see Backend
        return []

    def kernels(self, bundle: Bundle, engine: EngineMetadata) -> KernelsReport | None:  # noqa: ARG002 - see Backend
        return None

    def table(self, bundle: Bundle, engines: Mapping[str, EngineMetadata]) -> Table | None:  # noqa: ARG002 - see Backend
        return None


def open_graphs(bundle: Bundle, name: str, progress: Stages | None = None) -> tuple[GraphFile, ...]:
    """The graphs of an engine, as in `EngineMetadata.graphs`: every file opened once, hashed, and read or mapped.

    Raises BundleError or EngineError.
    """
    _, engine = bundle.engine(name)
    with opened_files(bundle, name, engine.graphs, progress) as files:
        return tuple(GraphFile.of(bundle.directory, graph, bundle.read_bytes(graph), files) for graph in engine.graphs)


def operators_for(engine: EngineMetadata) -> Path | None:
    """The operator library that an engine needs; None if ONNX Runtime has all. Raises EngineError."""
    if engine.operators not in ("", DOMAIN):
        raise EngineError(f"the engine needs operators of {shown(engine.operators)} (there are: {DOMAIN})")
    if not engine.operators:
        return None
    instruction_set()
    return operators_path()
