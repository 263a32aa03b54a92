"""The weight formats that there are, by name."""

from __future__ import annotations

from moevlm.export.formats.base import WeightFormat
from moevlm.export.formats.float4 import Float4Format
from moevlm.export.formats.float8 import Float8Format
from moevlm.export.formats.integers import IntFormat

INTEGERS = {"int8": 8, "int4": 4}
FORMATS = (*INTEGERS, "fp8", "fp4")
GROUP_SIZES = (32, 128)


def weight_format(name: str, group_size: int, scales: str = "float32") -> WeightFormat:
    """The format called `name`, one of FORMATS. Raises KeyError for another."""
    if name in INTEGERS:
        return int_format(name, group_size, scales)
    floats: dict[str, type[Float8Format] | type[Float4Format]] = {"fp8": Float8Format, "fp4": Float4Format}
    return floats[name](group_size, scales)


def int_format(name: str, group_size: int, scales: str = "float32") -> IntFormat:
    """The format called `name`, one of INTEGERS. Raises KeyError for another."""
    return IntFormat(INTEGERS[name], group_size, scales)
