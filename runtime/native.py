"""Where the library of moevlm's own CPU operators lies."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from moevlm.runtime.errors import EngineError

CPU_OPERATORS = "moevlm.cpu"


def operators_path() -> Path:
    """The operator library of the domain moevlm.cpu, built when moevlm is installed. Raises EngineError."""
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"cpu_operators{suffix}"
        if path.is_file():
            return path
    raise EngineError(f"{folder} has no cpu_operators library: install moevlm again where there is a C++ compiler")
