"""Where the experts' weights of an engine on a GPU lie: "device", "host", or "host:N" for those of N sparse layers."""

import re

from moevlm.runtime.core.errors import RequestError, shown

DEVICE = "device"
_ALLOWED = "device, host, or host:N for the experts of N layers"


def require_experts_in(value: str) -> None:
    """Raises RequestError for a text that is none of these."""
    if not isinstance(value, str) or re.fullmatch(r"device|host(:[1-9][0-9]{0,5})?", value) is None:
        raise RequestError(f"unsupported value experts_in = {shown(value)} (allowed: {_ALLOWED})")


def host_layers(value: str, sparse: int) -> int:
    """How many of the `sparse` layers with experts keep them in the host's memory. Raises RequestError for too many."""
    require_experts_in(value)
    if value == DEVICE:
        return 0
    count = int(value.partition(":")[2] or sparse)
    if count > sparse:
        raise RequestError(f"unsupported value experts_in = {value} (allowed: up to host:{sparse}, all sparse layers)")
    return count
