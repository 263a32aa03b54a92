"""Where the compiled libraries are. They are loaded by path, into an engine, and are no Python modules."""

import ctypes
from pathlib import Path

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.installation import install_command

FOLDER = Path(__file__).parents[1]
OPERATORS = "cpu_operators"
PLUGIN = "tensorrt_plugin"
DOMAIN = "moevlm.cpu"


def operators_path() -> Path:
    """The library of the domain moevlm.cpu, for SessionOptions.register_custom_ops_library. Raises EngineError."""
    return _path(OPERATORS)


def instruction_set() -> str:
    """The instruction set that the CPU operators use: baseline, avx2, avx512 or avx512_vnni.

    The best that the processor has, and at most what the environment variable MOEVLM_CPU_ISA says. Raises EngineError.
    """
    text = ctypes.create_string_buffer(256)
    found = ctypes.CDLL(str(operators_path())).moevlm_instruction_set
    found.argtypes, found.restype = (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_bool
    if not found(text, len(text)):
        raise EngineError(f"unsupported value in the environment: {text.value.decode(errors='replace')}")
    return text.value.decode()


def plugin_path() -> Path:
    """The library of the TensorRT plugins, for IPluginRegistry.load_library. Raises EngineError."""
    return _path(PLUGIN)


def _path(name: str) -> Path:
    path = FOLDER / f"{name}.so"
    if path.is_file():
        return path
    others = "; targets ort-cpu do without" if name == OPERATORS else ""
    raise EngineError(f"{name} was not built in {FOLDER} (install g++, then {install_command()}{others})")
