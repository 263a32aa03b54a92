"""llama.cpp compiled for this machine from the source distribution of its Python binding, and checkpoints for it."""

import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from bench.peers.environment import PEERS, new_environment, run

VERSION = "0.3.36"
PACKAGE = f"llama-cpp-python=={VERSION}"
FOLDER = PEERS / "llama_cpp"
PYTHON = FOLDER / "venv/bin/python"
SOURCES = FOLDER / f"llama_cpp_python-{VERSION}/vendor/llama.cpp"


def set_up() -> None:
    """The environment and the converter's sources, once; ten minutes on two cores. Raises PeerError."""
    done = FOLDER / f"{VERSION}.done"
    if done.exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "setup.log"
    new_environment(PYTHON, log)
    pip, source = [PYTHON, "-m", "pip"], ["--no-binary", "llama-cpp-python"]
    run([*pip, "install", *source, PACKAGE, "--config-settings=cmake.args=-DGGML_NATIVE=ON"], log)
    run([*pip, "download", *source, "--no-deps", "--dest", FOLDER, PACKAGE], log)
    with tarfile.open(FOLDER / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
        archive.extractall(FOLDER, filter="data")
    done.touch()


def prepare(checkpoint: Path, bits: Sequence[int]) -> None:
    """Write the checkpoint's quantized forms beside it, those that are not there yet. Raises PeerError."""
    for width in bits:
        if model_of(checkpoint, width).exists():
            continue
        full, log = checkpoint.with_suffix(".bf16.gguf"), FOLDER / "convert.log"
        if not full.exists():
            run([sys.executable, "-m", "bench.peers.llama_cpp_convert", SOURCES, checkpoint, full], log)
        run([PYTHON, "-m", "bench.peers.llama_cpp_quantize", full, model_of(checkpoint, width), width], log)


def model_of(checkpoint: Path, bits: int) -> Path:
    """Where the checkpoint lies with weights of so many bits."""
    return checkpoint.with_suffix(f".q{bits}_0.gguf")
