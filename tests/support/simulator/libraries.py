"""The compiled libraries that a simulated GPU runs on."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Libraries:
    """Compiled for tests: the plugin library on the recording driver, the harness that plays TensorRT, that driver."""

    plugins: Path
    harness: Path
    driver: Path
