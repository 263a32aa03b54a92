"""Engines of TensorRT and TensorRT-RTX, on the first GPU that this process may use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

from moevlm.runtime.backends.base import EngineOptions, KernelsReport, Table, opened_files
from moevlm.runtime.backends.tensorrt.driver import find_gpu
from moevlm.runtime.backends.tensorrt.kernel_resources import kernels_of
from moevlm.runtime.backends.tensorrt.library import find_module
from moevlm.runtime.backends.tensorrt.limits import limits_of
from moevlm.runtime.backends.tensorrt.plan_check import plan_problems
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata, TensorRTMetadata
from moevlm.runtime.core.errors import EngineError, Misfit, RequestError
from moevlm.runtime.core.experts_in import host_layers
from moevlm.runtime.core.gpus import gpu_text, sms_text
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.printable import bytes_text
from moevlm.runtime.core.progress import Stages, silent
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.step import EngineLimits

_HEADS = ("target", "runs on", "GPUs", "activations", "experts", "a step", "context", "patches")


class TensorRTBackend:
    """See `Backend`."""

    machine = ""

    @cached_property
    def _sm(self) -> int | None:
        """Of this machine's GPU, which is looked for when the first engine asks; None without one."""
        try:
            gpu = find_gpu()
        except EngineError as error:
            self.machine = f"this machine has {error}"
            return None
        self.machine = f"this machine has {gpu.name}, sm{gpu.sm}"
        return gpu.sm

    def misfit(self, engine: EngineMetadata) -> Misfit | None:
        if self._sm not in engine.sms:
            return Misfit(f"needs {' or '.join(map(gpu_text, sorted(engine.sms)))}")
        try:
            find_module(_built(engine))
        except Misfit as error:
            return error
        except EngineError as error:
            return Misfit(str(error))
        return None

    def require_library(self, engine: EngineMetadata) -> None:
        find_module(_built(engine))

    def limits(self, model: ModelMetadata, engine: EngineMetadata) -> EngineLimits:
        return limits_of(model, engine, _built(engine))

    def load(
        self,
        bundle: Bundle,
        name: str,
        options: EngineOptions,
        progress: Stages | None = None,
    ) -> Engine:
        from moevlm.runtime.backends.tensorrt.engine import EngineFile, EngineFiles, TensorRTEngine

        engine, model = bundle.manifest.engines[name], bundle.manifest.model
        host = host_layers(options.experts_in, sum(bool(layer.experts) for layer in model.layers))
        if host and not _built(engine).experts:
            raise RequestError(f"experts_in = {options.experts_in} has no effect on {name}: it has its experts inside")
        built, graphs = _built(engine), engine.graphs
        with opened_files(bundle, name, graphs, progress) as files:
            experts = files[built.experts].map() if built.experts else None
        # They are native code: the very bytes that were checked go on, whatever happens to the files meanwhile.
        *vision, decoder = (
            EngineFile(graph, bundle.read_bytes(graph), bundle.manifest.files[graph].sha256) for graph in graphs
        )
        told = partial(progress, "preparing steps") if progress else silent
        return TensorRTEngine(EngineFiles(next(iter(vision), None), decoder, experts, host), model, engine, told)

    def problems(self, bundle: Bundle, engine: EngineMetadata) -> list[str]:
        return plan_problems(bundle, engine, _built(engine))

    def kernels(self, bundle: Bundle, engine: EngineMetadata) -> KernelsReport | None:
        return kernels_of(bundle, engine)

    def table(self, bundle: Bundle, engines: Mapping[str, EngineMetadata]) -> Table | None:
        """What the engines were built with and for."""
        rows, lines = [], []
        for name, engine in engines.items():
            built = _built(engine)
            experts = bytes_text(bundle.manifest.files[built.experts].size) if built.experts else "-"
            product = f"{built.product} {built.version}{' or its lean runtime' if built.version_compatible else ''}"
            limits = self.limits(bundle.manifest.model, engine)
            steps = f"{limits.max_sequences} sequences, {limits.max_tokens} tokens"
            sizes = experts, steps, str(limits.max_context), str(built.max_patches)
            rows.append((name, product, sms_text(built.sms), built.activations, *sizes))
            if (kernels := self.kernels(bundle, engine)) is not None:
                spills = f"spills of up to {kernels.spilled} bytes a thread" if kernels.spilled else "no spills"
                shared = bytes_text(kernels.shared)
                lines.append(f"{name}: {kernels.count} kernels, up to {shared} of shared memory, {spills}")
        return Table("TensorRT engines, up to", _HEADS, rows, lines)


def _built(engine: EngineMetadata) -> TensorRTMetadata:
    assert engine.tensorrt is not None  # the registry's choice
    return engine.tensorrt
