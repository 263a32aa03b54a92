"""Where the compiled operators are. They are loaded by path, into ONNX Runtime, and are no Python module."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from moevlm.runtime.errors import EngineError

OPERATORS = "cpu_operators"
DOMAIN = "moevlm.cpu"


def operators_path() -> Path:
    """The library of the domain moevlm.cpu, for SessionOptions.register_custom_ops_library. Raises EngineError."""
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"{OPERATORS}{suffix}"
        if path.is_file():
            return path
    raise EngineError(f"{OPERATORS} was not built in {folder} (install g++, then pip install --force-reinstall moevlm)")
