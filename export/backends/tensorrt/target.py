"""Names of TensorRT targets: rtx:sm86,sm89 is one pair of plans for both, trt:sm80,sm90 is one for each."""

import ctypes
from importlib.util import find_spec

from moevlm.export.backends.tensorrt.engine_target import TensorRTTarget
from moevlm.export.backends.tensorrt.options import Options
from moevlm.export.backends.tensorrt.product import NATIVE_MOE_SMS, RTX, TENSORRT, Product, installed
from moevlm.plugins.gpu.devices import DEVICES
from moevlm.runtime.backends.libraries import plugin_path
from moevlm.runtime.core.errors import BuildError, EngineError
from moevlm.runtime.core.gpus import gpu_text, sm_of
from moevlm.runtime.core.installation import install_command

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


def targets(name: str, options: Options) -> tuple[TensorRTTarget, ...]:
    """The targets of one name, none if it is of another kind.

    Raises BuildError for a GPU that the product does not take or that lacks the dtype, an option that it does not have,
    and what is missing to build here.
    """
    kind, _, rest = name.partition(":")
    product = {product.kind: product for product in (RTX, TENSORRT)}.get(kind)
    if product is None:
        return ()
    sms = _sms(name, rest, product)
    for sm in sms:
        if options.activations == "bfloat16" and not DEVICES[sm].bf16:
            raise BuildError(f"target {name}: sm{sm} has no bfloat16 (use --dtype fp16)")
    _check_options(name, product, sms, options)
    installed(product)
    if find_spec("triton") is None:
        raise BuildError(f"target {name}: compiling its kernels needs triton ({install_command('kernels')})")
    try:
        plugin_path()
    except EngineError as error:
        raise BuildError(str(error)) from error
    if product is RTX:
        return (TensorRTTarget(product, sms, options),)
    here = current_sm()
    for sm in sms:
        if sm != here:
            machine = f"this machine has sm{here}" if here else "this machine has no GPU"
            raise BuildError(f"target {name}: TensorRT builds for the GPU that it is on, and {machine}, not sm{sm}")
    return tuple(TensorRTTarget(product, (sm,), options) for sm in sms)


def _sms(name: str, rest: str, product: Product) -> tuple[int, ...]:
    sms = []
    allowed = ", ".join(map(gpu_text, product.sms))
    for part in rest.split(","):
        sm = sm_of(part) or 0
        if sm not in product.sms:
            other = f'; "trt:{part}" is built on its own GPU' if product is RTX and sm in TENSORRT.sms else ""
            raise BuildError(f'target {name}: {product.title} takes no GPU "{part}" (allowed: {allowed}{other})')
        sms.append(sm)
    return tuple(sorted(set(sms)))


def _check_options(name: str, product: Product, sms: tuple[int, ...], options: Options) -> None:
    if product is RTX and options.version_compatible:
        raise BuildError(f"target {name}: TensorRT-RTX has no lean runtime (version compatible: trt only)")
    if not options.native_moe:
        return
    if product is RTX or not set(sms) <= set(NATIVE_MOE_SMS):
        allowed = ", ".join(f"trt:sm{sm}" for sm in NATIVE_MOE_SMS)
        raise BuildError(f"target {name} has no MoE layer of TensorRT's own (allowed: {allowed})")
    if options.weights:
        raise BuildError(f"experts = {options.experts} with TensorRT's own MoE layer (allowed: same)")


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
