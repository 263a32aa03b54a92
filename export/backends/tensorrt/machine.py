"""What a machine must have to build a TensorRT target."""

import ctypes
from importlib.util import find_spec

from moevlm.export.backends.tensorrt.product import RTX, Product, installed
from moevlm.runtime.backends.libraries import plugin_path
from moevlm.runtime.core.errors import BuildError, EngineError
from moevlm.runtime.core.installation import install_command

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


def require(name: str, product: Product, sms: tuple[int, ...]) -> None:
    """Raises BuildError for what is missing here to build the target of that name: a package, or its GPU."""
    installed(product)
    if find_spec("triton") is None:
        raise BuildError(f"target {name}: compiling its kernels needs triton ({install_command('kernels')})")
    try:
        plugin_path()
    except EngineError as error:
        raise BuildError(str(error)) from error
    if product is RTX:
        return
    here = current_sm()
    for sm in sms:
        if sm != here:
            machine = f"this machine has sm{here}" if here else "this machine has no GPU"
            raise BuildError(f"target {name}: TensorRT builds for the GPU that it is on, and {machine}, not sm{sm}")


def current_sm() -> int:
    """Of the first GPU of this machine; 0 if there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    values = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0):
        return 0
    for value, attribute in zip(values, (_MAJOR, _MINOR), strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0):
            return 0
    return 10 * values[0].value + values[1].value
