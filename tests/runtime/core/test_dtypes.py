"""The table of dtypes says what the libraries and file formats themselves say."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import _SIZE, _TYPES, save

from moevlm.runtime.core.dtypes import DTYPES, SAFETENSORS, TENSORRT, DType, dtype_of

ROWS = list(DTYPES.values())


@pytest.mark.parametrize("dtype", ROWS, ids=lambda dtype: dtype.name)
def test_a_row_agrees_with_numpy_and_onnx(dtype: DType) -> None:
    assert dtype.numpy.name == dtype.name
    assert dtype_of(dtype.numpy) is dtype
    assert ir.DataType(dtype.onnx).numpy() == dtype.numpy
    assert ir.DataType(dtype.onnx).bitwidth == dtype.bits
    if dtype.bits >= 8:
        assert dtype.numpy.itemsize == dtype.bytes


def test_names_are_those_of_safetensors() -> None:
    for name, theirs in _TYPES.items():
        if (row := SAFETENSORS.get(name)) is not None:
            assert getattr(torch, row.name) == theirs
            assert _SIZE[theirs] == row.bytes
    assert set(SAFETENSORS) - {"F8_E8M0"} <= set(_TYPES)
    exponents = save({"a": torch.zeros(1, dtype=torch.float8_e8m0fnu)})  # written, though the table has no row for it
    assert b'"F8_E8M0"' in exponents


def test_names_are_those_of_triton() -> None:
    triton = pytest.importorskip("triton._utils", reason="triton is not installed")
    for row in (row for row in ROWS if row.short):
        assert triton.canonicalize_dtype(row.name) == row.short


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_names_and_numbers_are_those_of_tensorrt(module: str) -> None:
    trt = pytest.importorskip(module, reason=f"{module} is not installed")
    for name, row in TENSORRT.items():
        assert int(getattr(trt.DataType, name)) == row.tensorrt_number
    assert all(row.tensorrt_number == -1 for row in ROWS if not row.tensorrt)
