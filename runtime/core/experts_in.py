"""Where the experts' weights of an engine on a GPU lie: "device", "host", or "host:N" for those of N sparse layers."""

import re

from moevlm.runtime.core.errors import RefusedOption

DEVICE = "device"
_ALLOWED = "device, host, or host:N for the experts of N layers"


def require_experts_in(value: str) -> None:
    """Raises RefusedOption for a text that is none of these."""
    if not isinstance(value, str) or re.fullmatch(r"device|host(:[1-9][0-9]{0,5})?", value) is None:
        raise RefusedOption("experts_in", value, _ALLOWED)


def host_layers(value: str, sparse: int) -> int:
    """How many of the `sparse` layers with experts keep them in the host's memory. Raises RefusedOption for more."""
    require_experts_in(value)
    if value == DEVICE:
        return 0
    count = int(value.partition(":")[2] or sparse)
    if count > sparse:
        raise RefusedOption("experts_in", value, f"up to host:{sparse}, all sparse layers")
    return count
