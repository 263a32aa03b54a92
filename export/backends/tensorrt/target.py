"""Names of TensorRT targets: rtx:sm86,sm89 is one pair of plans for both, trt:sm80,sm90 is one for each."""

from moevlm.export.backends.tensorrt.engine_target import TensorRTTarget
from moevlm.export.backends.tensorrt.options import AUTO, SAME, Options
from moevlm.export.backends.tensorrt.product import NATIVE_MOE_SMS, RTX, TENSORRT, Product
from moevlm.plugins.gpu.devices import DEVICES
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.gpus import gpu_text, sm_of


def targets(name: str, options: Options) -> tuple[TensorRTTarget, ...]:
    """The targets of one name, none if it is of another kind.

    Raises BuildError for a GPU that the product does not take or that lacks the dtype, and for an option that it does
    not have.
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
    if product is RTX:
        return (TensorRTTarget(product, sms, options),)
    return tuple(TensorRTTarget(product, (sm,), options) for sm in sms)


def _sms(name: str, rest: str, product: Product) -> tuple[int, ...]:
    sms = []
    allowed = ", ".join(map(gpu_text, product.sms))
    for part in rest.split(","):
        sm = sm_of(part) or 0
        if sm not in product.sms:
            other = f'; "trt:{part}" is built on its own GPU' if product is RTX and sm in TENSORRT.sms else ""
            wrong = f'takes no GPU "{part}"' if part else "needs a GPU's name"
            raise BuildError(f"target {name}: {product.title} {wrong} (allowed: {allowed}{other})")
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
    if options.experts not in (AUTO, SAME):
        raise BuildError(f"experts = {options.experts} with TensorRT's own MoE layer (allowed: same)")
