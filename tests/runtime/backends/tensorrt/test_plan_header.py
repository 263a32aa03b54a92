import struct

import pytest

from moevlm.runtime.backends.tensorrt.plan_header import HEADER_BYTES, PlanHeader, plan_header

# The first bytes of a plan that TensorRT-RTX 1.7.1.116 built for SM89 and SM120.
RTX_PLAN = bytes.fromhex(
    "76747274 00000000 02000000 00000000 9c460000 00000000 01070174 76747274 18000000 00000000"
    "00000000 00000000 00000000 00000000 00210000 00000000 4e474e45 00000000"
)


def test_header_of_a_plan() -> None:
    assert plan_header(RTX_PLAN) == PlanHeader("tensorrt_rtx", "1.7.1.116", 18076, (89, 120))


@pytest.mark.parametrize(("bit", "sm"), [(0, 75), (1, 80), (2, 86), (3, 89), (4, 120), (5, 121)])
def test_one_bit_for_each_kind_of_gpu(bit: int, sm: int) -> None:
    header = plan_header(RTX_PLAN[:32] + struct.pack("<I", 1 << bit) + RTX_PLAN[36:])
    assert header is not None
    assert header.sms == (sm,)


def test_plan_of_tensorrt_names_its_version_and_no_gpu() -> None:
    plan = b"ptrt" + RTX_PLAN[4:24] + bytes([10, 14, 1, 48]) + RTX_PLAN[28:]
    assert plan_header(plan) == PlanHeader("tensorrt", "10.14.1.48", 18076, ())


@pytest.mark.parametrize("data", [b"", b"ONNX" + RTX_PLAN[4:], RTX_PLAN[: HEADER_BYTES - 1]])
def test_what_is_no_plan_has_no_header(data: bytes) -> None:
    assert plan_header(data) is None
