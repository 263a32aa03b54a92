"""The one table of dtypes: what each library and file format calls them, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DType:
    """name: numpy's, for some of them with ml_dtypes. bits: of one value. onnx: number in onnx.TensorProto.DataType.

    safetensors, tensorrt: names there, "" where there is none. tensorrt_number: in nvinfer1::DataType, -1 for none.
    short: as Triton and the option --dtype name it.
    """

    name: str
    bits: int
    onnx: int
    safetensors: str = ""
    tensorrt: str = ""
    tensorrt_number: int = -1
    short: str = ""

    @property
    def bytes(self) -> int:
        """Of one value; of dtypes that take whole bytes."""
        return self.bits // 8

    @property
    def pointer(self) -> str:
        """A pointer to values, in the signature of a Triton kernel: *bf16."""
        return f"*{self.short}"

    @property
    def numpy(self) -> np.dtype:
        import numpy as np

        if self.name in _OF_ML_DTYPES:
            import ml_dtypes  # noqa: F401 - tells numpy these names
        return np.dtype(self.name)


E4M3 = "float8_e4m3fn"
_OF_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int4")
_TABLE = (
    #     name          bits  ONNX  safetensors TensorRT       short
    DType("float64", 64, 11, "F64", short="fp64"),
    DType("float32", 32, 1, "F32", "FLOAT", 0, "fp32"),
    DType("float16", 16, 10, "F16", "HALF", 1, "fp16"),
    DType("bfloat16", 16, 16, "BF16", "BF16", 7, "bf16"),
    DType("float8_e4m3fn", 8, 17, "F8_E4M3", "FP8", 6, "fp8e4nv"),
    DType("float8_e5m2", 8, 19, "F8_E5M2", short="fp8e5"),
    DType("float8_e8m0fnu", 8, 24, "F8_E8M0"),
    DType("int64", 64, 7, "I64", "INT64", 8, "i64"),
    DType("int32", 32, 6, "I32", "INT32", 3, "i32"),
    DType("int16", 16, 5, "I16", short="i16"),
    DType("int8", 8, 3, "I8", "INT8", 2, "i8"),
    DType("int4", 4, 22, tensorrt="INT4", tensorrt_number=9),
    DType("uint64", 64, 13, "U64", short="u64"),
    DType("uint32", 32, 12, "U32", short="u32"),
    DType("uint16", 16, 4, "U16", short="u16"),
    DType("uint8", 8, 2, "U8", "UINT8", 5, "u8"),
    DType("bool", 8, 9, "BOOL", "BOOL", 4, "u1"),
)
DTYPES = {dtype.name: dtype for dtype in _TABLE}
SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}
TENSORRT = {dtype.tensorrt: dtype for dtype in _TABLE if dtype.tensorrt}


def dtype_of(array: np.dtype) -> DType:
    """The row of a numpy dtype. Raises KeyError for one that the table does not have."""
    return DTYPES[array.name]
