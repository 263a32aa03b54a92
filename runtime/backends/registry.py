"""The backends that there are: a line each. A module is imported when an engine of it is first asked about."""

from __future__ import annotations

import importlib

from moevlm.runtime.backends.base import Backend
from moevlm.runtime.core.engine_metadata import EngineMetadata

# By `EngineMetadata.backend`: module and class.
BACKENDS = {
    "onnxruntime": ("moevlm.runtime.backends.ort.backend", "OrtBackend"),
    "tensorrt": ("moevlm.runtime.backends.tensorrt.backend", "TensorRTBackend"),
}


class Backends:
    """One object of each backend that is asked for, so that each looks at this machine once."""

    def __init__(self) -> None:
        self._made: dict[str, Backend] = {}

    def of(self, engine: EngineMetadata) -> Backend:
        """The backend that runs an engine."""
        if engine.backend not in self._made:
            module, name = BACKENDS[engine.backend]
            self._made[engine.backend] = getattr(importlib.import_module(module), name)()
        return self._made[engine.backend]

    @property
    def machine(self) -> str:
        """What this machine has, in words, as far as a backend had to look."""
        return "; ".join(backend.machine for backend in self._made.values() if backend.machine)


def backend_of(engine: EngineMetadata) -> Backend:
    """The backend that runs an engine."""
    return Backends().of(engine)
