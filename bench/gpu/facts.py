"""The GPU that the check runs on, if there is one."""

import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "tensorrt", "tensorrt-rtx")


def run() -> Iterator[dict[str, Any]]:
    """One entry: the GPU and the versions, or `missing`, what there is not."""
    yield {"kind": "facts"} | facts()


def facts() -> dict[str, Any]:
    """See `run`."""
    try:
        import torch
        import triton  # noqa: F401 - only whether it is there
    except ImportError as error:
        return {"missing": f"{error.name} is not installed (needed: torch, triton, numpy)"}
    if not torch.cuda.is_available():
        return {"missing": f"no CUDA GPU that torch {torch.__version__} can use"}
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "sm": 10 * gpu.major + gpu.minor,
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "cache_bytes": gpu.L2_cache_size,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


@cache
def launcher_missing() -> str:
    """Why Triton cannot launch kernels here, in one line; empty where it can.

    Its launcher is compiled on the spot, by a C compiler that finds Python's headers.
    """
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
