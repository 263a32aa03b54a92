"""llama.cpp compiled for this machine from the source distribution of its Python binding, and checkpoints for it."""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from bench.peers.client import PeerError

VERSION = "0.3.36"
SDIST = f"llama-cpp-python=={VERSION}"
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/peers/llama_cpp"
PYTHON = FOLDER / "venv/bin/python"
SOURCES = FOLDER / f"llama_cpp_python-{VERSION}/vendor/llama.cpp"


def set_up() -> None:
    """The environment and the converter's sources, once; ten minutes on two cores. Raises PeerError."""
    done = FOLDER / f"{VERSION}.done"
    if done.exists():
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    log = FOLDER / "setup.log"
    _run([sys.executable, "-m", "venv", str(PYTHON.parents[1])], log)
    pip, binary = [str(PYTHON), "-m", "pip"], ["--no-binary", "llama-cpp-python"]
    _run([*pip, "install", *binary, SDIST, "--config-settings=cmake.args=-DGGML_NATIVE=ON"], log)
    _run([*pip, "download", *binary, "--no-deps", "--dest", str(FOLDER), SDIST], log)
    with tarfile.open(next(FOLDER.glob("*.tar.gz"))) as archive:
        archive.extractall(FOLDER, filter="data")
    done.touch()


def prepare(checkpoint: Path, bits: Sequence[int]) -> None:
    """Write the checkpoint's quantized forms beside it, those that are not there yet. Raises PeerError."""
    for width in bits:
        if model_of(checkpoint, width).exists():
            continue
        full, log = checkpoint.with_suffix(".bf16.gguf"), FOLDER / "convert.log"
        if not full.exists():
            convert = [sys.executable, "-m", "bench.peers.llama_cpp_convert"]
            _run([*convert, str(SOURCES), str(checkpoint), str(full)], log)
        quantize = [str(PYTHON), "-m", "bench.peers.llama_cpp_quantize"]
        _run([*quantize, str(full), str(model_of(checkpoint, width)), str(width)], log)


def model_of(checkpoint: Path, bits: int) -> Path:
    """Where the checkpoint lies with weights of so many bits."""
    return checkpoint.with_suffix(f".q{bits}_0.gguf")


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("a") as file:
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise PeerError(f"{Path(command[0]).name} ended with status {status} while setting up llama.cpp (see {log})")
