"""Where the compiled libraries are. They are loaded by path, into an engine, and are no Python modules."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from moevlm.runtime.errors import EngineError
from moevlm.runtime.installation import install_command

OPERATORS = "cpu_operators"
PLUGIN = "tensorrt_plugin"
DOMAIN = "moevlm.cpu"


def operators_path() -> Path:
    """The library of the domain moevlm.cpu, for SessionOptions.register_custom_ops_library. Raises EngineError."""
    return _path(OPERATORS)


def plugin_path() -> Path:
    """The library of the TensorRT plugins, for IPluginRegistry.load_library. Raises EngineError."""
    return _path(PLUGIN)


def _path(name: str) -> Path:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    others = "; targets ort-cpu do without" if name == OPERATORS else ""
    raise EngineError(f"{name} was not built in {folder} (install g++, then {install_command()}{others})")
