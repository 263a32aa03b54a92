"""One of an expert's two weights, as its kernels are specialised to it."""

from dataclasses import dataclass

from moevlm.runtime.core.dtypes import DTYPES

# The dtype that a weight's code has in each format; "" is the dtype of the activations.
FORMATS = {"": "", "int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn", "fp4": "int4"}
ZEROS_PER_WORD = 8  # zeros of int4, 4 bits each
SCALES_PER_WORD = 4  # scales in e4m3, 8 bits each


def scale_rows(rows: int) -> int:
    """How many scales of one group are stored for so many rows of a weight: each group's start at 16 bytes."""
    return -(-rows // 8) * 8


@dataclass(frozen=True)
class Projection:
    """rows, width: of its matrix, outputs by inputs. format: one of FORMATS. group: columns that share a scale. zeros:
    each group has a zero of its own, too.

    groups, stored_width: of a row, the last group whole; stored_width counts values. scale_rows: how many scales of a
    group are stored. native_fp8: the GPU converts e4m3 itself. quarters: a unit of 16 bits has four weights.
    row_scales: a group is four of NVFP4, whose e4m3 scales are a word of 32 bits, and each row has a scale of its own.
    All are fields: Triton compiles a kernel anew when what it is specialised to prints otherwise.
    """

    rows: int
    width: int
    format: str
    group: int
    has_bias: bool
    groups: int
    stored_width: int
    scale_rows: int
    native_fp8: bool
    zeros: bool
    quarters: bool
    row_scales: bool

    @classmethod
    def of(
        cls,
        rows: int,
        width: int,
        format: str,
        group: int,
        has_bias: bool = False,
        zeros: bool = False,
        row_scales: bool = False,
    ) -> "Projection":
        """What follows from a matrix and its format."""
        groups = -(-width // group)
        stored_width = groups * group if format else width
        quarters = FORMATS[format] == "int4"
        stored = groups, stored_width, scale_rows(rows)
        return cls(rows, width, format, group, has_bias, *stored, False, zeros, quarters, row_scales)

    @property
    def zero_words(self) -> int:
        """How many words the zeros of one group take."""
        return self.scale_rows // ZEROS_PER_WORD

    def stored(self, dtype: str) -> tuple[str, tuple[int, int]]:
        """dtype and shape of one expert's weight in memory, with activations in `dtype`."""
        if not self.format:
            return dtype, (self.rows, self.width)
        return "int8", (self.rows, self.stored_width * DTYPES[FORMATS[self.format]].bits // 8)
