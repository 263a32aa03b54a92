"""What differs between TensorRT-RTX and TensorRT, and how each is imported."""

import ctypes
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.installation import install_command

RTX_SMS = (75, 80, 86, 89, 120, 121)
TENSORRT_SMS = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
NATIVE_MOE_SMS = (100, 103, 110)
NO_FLOAT32_GEMM = 75


@dataclass(frozen=True)
class Product:
    """kind: of targets. module: Python's name of it. extra: of this package that installs it. sms: that it takes."""

    kind: str
    module: str
    title: str
    extra: str
    sms: tuple[int, ...]


RTX = Product("rtx", "tensorrt_rtx", "TensorRT-RTX", "rtx", RTX_SMS)
TENSORRT = Product("trt", "tensorrt", "TensorRT", "trt", TENSORRT_SMS)
PRODUCTS = {product.module: product for product in (RTX, TENSORRT)}


def installed(product: Product) -> None:
    """Raises BuildError unless the product can be imported."""
    if find_spec(product.module) is None:
        raise BuildError(f"a {product.kind} target needs {product.module} ({install_command(product.extra)})")


def load(product: Product, links: Path) -> Any:
    """Import the product's module. links: an empty folder that stays for as long as the process.

    Raises BuildError if it is not installed, or cannot be loaded any more so that its parser works.
    """
    installed(product)
    if product is RTX:
        _link_rtx(links)
    return import_module(product.module)


def _link_rtx(links: Path) -> None:
    """Load the libraries of TensorRT-RTX so that the ONNX parser finds the core library under the name it looks for.

    The parser opens libtensorrt_rtx.so, which the package does not have, in the folder that it was itself opened in,
    links not followed: here, where that name is a link to the file that is loaded already. Without it, it aborts.
    """
    if "tensorrt_rtx_libs" in sys.modules:
        raise BuildError("tensorrt_rtx was imported before: build in a process of its own")
    spec = find_spec("tensorrt_rtx_libs")
    folders = spec.submodule_search_locations if spec is not None else None
    libraries = {path.name: path for folder in folders or () for path in Path(folder).glob("libtensorrt*.so*")}
    core = [name for name in libraries if name.startswith("libtensorrt_rtx.so")]
    parser = [name for name in libraries if "onnxparser" in name]
    if not core or not parser:
        raise BuildError(f"tensorrt_rtx_libs has no libtensorrt_rtx.so and no ONNX parser ({install_command('rtx')})")
    for name, path in (*libraries.items(), ("libtensorrt_rtx.so", libraries[core[0]])):
        (links / name).unlink(missing_ok=True)
        (links / name).symlink_to(path.resolve())
    for name in (core[0], parser[0]):
        ctypes.CDLL(str(links / name))


def configure(module: Any, product: Product, config: Any, sms: tuple[int, ...]) -> None:
    """Say which GPUs a plan is for. TensorRT builds for the one it is on; TensorRT-RTX needs none."""
    if product is RTX:
        config.num_compute_capabilities = len(sms)
        for i, sm in enumerate(sms):
            if not config.set_compute_capability(getattr(module.ComputeCapability, f"SM{sm}"), i):
                raise BuildError(f"{product.title} {module.__version__} takes no sm{sm}")
