"""A graph in ONNX Runtime, on the CPU, with its weights in the files that they are mapped from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moevlm.runtime.backends.ort.library import onnxruntime
from moevlm.runtime.bundle.graph_file import GraphFile
from moevlm.runtime.core.errors import EngineError, one_line
from moevlm.runtime.engine.cancellation import Cancellation

# Longer than from one operator, or one token, to the next. A thread that waits longer gives its core to others.
_SPIN_MICROSECONDS = 500


class Session:
    """An InferenceSession. name: vision or decoder, for errors."""

    def __init__(
        self, name: str, graph: GraphFile, threads: int | None, spinning: bool, operators: Path | None
    ) -> None:
        """As `OrtEngine`. Raises EngineError if ONNX Runtime refuses the graph."""
        self.name, self._file, self._ort = name, graph, onnxruntime()
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
        options.log_severity_level = 4  # what it says on failure is in the exception
        # ONNX Runtime wants to see the data files, and with all weights given reads none of them.
        folder = os.fsencode(graph.path.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            if operators is not None:
                options.register_custom_ops_library(str(operators))
            # The session has no reference of its own to these.
            self._weights = {
                name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in graph.weights.items()
            }
            for weight, value in self._weights.items():
                options.add_initializer(weight, value)
            self.inference: Any = self._ort.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"ONNX Runtime refused {graph.path.name}: {_first_line(error)}") from error

    def require_whole(self) -> None:
        """Raises EngineError if the weights were cut short on the disk: reading them would end the process."""
        self._file.require_whole()

    @contextmanager
    def running(self, cancellation: Cancellation | None) -> Iterator[Any]:
        """Options of one run, which a cancellation ends. Raises EngineError if it fails by itself."""
        options = self._ort.RunOptions()
        options.add_run_config_entry(
            "gpu_graph_id", "0"
        )  # looked up at each run; where it is absent, for 30 us and more
        cancellation = cancellation or Cancellation()
        with cancellation.stopping(lambda: setattr(options, "terminate", True)):
            try:
                yield options
            except Exception as error:
                cancellation.check()
                raise EngineError(f"the {self.name} graph failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return one_line(str(error).strip().partition("\n")[0])
