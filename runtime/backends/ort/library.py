"""ONNX Runtime, imported here and nowhere else, so that its telemetry is off before its first event."""

import os
from types import ModuleType

from moevlm.runtime.core.errors import EngineError, reason
from moevlm.runtime.core.installation import install_command

TELEMETRY = "ORT_DISABLE_TELEMETRY"


def onnxruntime() -> ModuleType:
    """The library, with its telemetry off unless the user set the variable. Raises EngineError if it does not load.

    Where the program imported the library before, it is too late to switch anything off.
    """
    os.environ.setdefault(TELEMETRY, "1")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise EngineError(f"this engine needs onnxruntime ({install_command('cpu')})") from error
    except ImportError as error:
        raise EngineError(f"onnxruntime does not load here: {reason(error)}") from error
    return onnxruntime
