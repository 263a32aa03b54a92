"""A TensorRT module: which of them fits an engine, what it says when it refuses, its plugins, its engines."""

from __future__ import annotations

import importlib
import threading
from collections import deque
from typing import Any

from moevlm.runtime.backends.tensorrt.plugin_library import checked_plugin_path
from moevlm.runtime.core.engine_metadata import TensorRTMetadata
from moevlm.runtime.core.errors import EngineError, Misfit
from moevlm.runtime.core.installation import install_command
from moevlm.runtime.core.names import PLUGINS

# By product.
MODULES = {"tensorrt": ("tensorrt", "tensorrt_lean"), "tensorrt_rtx": ("tensorrt_rtx",)}
EXTRAS = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}
PLUGIN_VERSION = "1"

_lock = threading.Lock()
_loggers: dict[str, Any] = {}  # TensorRT keeps the first logger that a process gives it
_plugins: dict[str, Any] = {}  # handles, by module: a library is registered once in a process


def find_module(metadata: TensorRTMetadata) -> Any:
    """The installed module that can run the engine. Raises Misfit, naming what there is, or EngineError."""
    if metadata.product not in MODULES:
        raise EngineError(f"unsupported value product = {metadata.product!r} (supported: {', '.join(MODULES)})")
    installed = []
    for name in MODULES[metadata.product]:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):  # of the libraries that it loads, too
            continue
        if _runs(name, module.__version__, metadata):
            return module
        installed.append(f"{name} {module.__version__}")
    hint = f"installed: {', '.join(installed)}" if installed else install_command(EXTRAS[metadata.product])
    raise Misfit(f"needs {metadata.product} {metadata.version} ({hint})")


def _runs(name: str, version: str, metadata: TensorRTMetadata) -> bool:
    """An engine runs on the version that built it; a version-compatible one on the lean module of that version, too.

    Later versions would hand it to that lean module, whose code our engines do not carry: none of theirs is ever run.
    """
    return version == metadata.version and (metadata.version_compatible or name != "tensorrt_lean")


class Library:
    """A module with its runtime object and this package's plugins. A device must be there, and its context current."""

    def __init__(self, metadata: TensorRTMetadata) -> None:
        """Raises EngineError if no module fits, or if the plugins do not load."""
        self.module = find_module(metadata)
        self.is_rtx = metadata.product == "tensorrt_rtx"
        self._logger = _logger(self.module)
        _load_plugins(self.module, self._logger)
        # Code inside of engines stays switched off, as it is by default: engine_host_code_allowed.
        self._runtime = self.module.Runtime(self._logger)

    def deserialize(self, name: str, data: bytes) -> Any:
        """An ICudaEngine from bytes whose hash was checked. Raises EngineError."""
        self._logger.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self.refused(f"load {name}")
        return engine

    def refused(self, what: str) -> EngineError:
        """The error for a call that returned None or False, with what TensorRT said first."""
        reason = next(iter(self._logger.errors), "it gave no reason")
        return EngineError(f"{self.module.__name__} {self.module.__version__} could not {what}: {reason}")

    def forget_errors(self) -> None:
        self._logger.errors.clear()

    def close(self) -> None:
        self._runtime = None


def _logger(module: Any) -> Any:
    with _lock:
        if module.__name__ not in _loggers:

            class Logger(module.ILogger):
                """Keeps the last errors; everything less is dropped."""

                def __init__(self) -> None:
                    module.ILogger.__init__(self)
                    self.errors: deque[str] = deque(maxlen=16)

                def log(self, severity: Any, msg: str) -> None:
                    if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                        self.errors.append(" ".join(msg.split()))

            _loggers[module.__name__] = Logger()
        return _loggers[module.__name__]


def _load_plugins(module: Any, logger: Any) -> None:
    """Register the package's plugins, unless they are, as after a build in this process."""
    with _lock:
        registry = module.get_plugin_registry()
        if module.__name__ in _plugins or all(
            registry.get_creator(name, PLUGIN_VERSION, "") is not None for name in PLUGINS
        ):
            return
        path = checked_plugin_path()
        logger.errors.clear()
        handle = registry.load_library(str(path))
        if handle is None:
            reason = next(iter(logger.errors), "it gave no reason")
            raise EngineError(f"{module.__name__} could not load the plugins in {path}: {reason}")
        _plugins[module.__name__] = handle
