"""Calls of the CUDA driver, each checked, and the GPU that it finds. cuda.bindings is imported at the first."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.installation import install_command


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process may use. sm: 89 for compute capability 8.9. driver: its CUDA, 13000 for 13.0."""

    name: str
    sm: int
    driver: int


def find_gpu() -> Gpu:
    """Raises EngineError, saying why, where there is none; nothing is allocated on the device."""
    driver = load_driver()
    device = call(driver, "cuDeviceGet", 0)
    attributes = driver.CUdevice_attribute
    major, minor = (
        call(driver, "cuDeviceGetAttribute", attribute, device)
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = call(driver, "cuDeviceGetName", 256, device).split(b"\0", 1)[0].decode(errors="replace")
    return Gpu(name, 10 * major + minor, call(driver, "cuDriverGetVersion"))


def load_driver() -> Any:
    """The module, once the driver is up. Raises EngineError."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise EngineError(
            f"no NVIDIA GPU that can be used: cuda-bindings is not installed ({install_command('rtx')})"
        ) from error
    try:
        result = driver.cuInit(0)[0]
    except Exception as error:  # the bindings' own, of several kinds over their versions
        raise EngineError("no NVIDIA GPU: its driver, libcuda, was not found") from error
    if result == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        raise EngineError("no NVIDIA GPU that this process may use")
    _require(driver, "cuInit", result)
    return driver


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """What the function of this name returns: nothing, a value or several. Raises EngineError where it fails."""
    result, *values = getattr(driver, name)(*arguments)
    _require(driver, name, result)
    return values[0] if len(values) == 1 else tuple(values)


def _require(driver: Any, name: str, result: Any) -> None:
    if result != driver.CUresult.CUDA_SUCCESS:
        text = driver.cuGetErrorString(result)[1]
        raise EngineError(f"{name} failed: {result.name}" + (f" ({text.decode()})" if text else ""))
