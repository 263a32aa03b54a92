"""MXFP4: e2m1 numbers in groups of 32 whose scale is a power of two (OCP Microscaling Formats 1.0).

gpt-oss stores blocks [E, N, groups, 16 bytes] and scales [E, N, groups]; compressed-tensors weight_packed [N, K / 2]
and weight_scale [N, K / 32]. Value: number * 2 ** (scale - 127).
"""

from dataclasses import dataclass

from moevlm.export.checkpoint.quantized.layout import Format, Parts, Spelling, exponents, matrix_shape, wrong_shape
from moevlm.export.checkpoint.quantized.nibbles import nibbles
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.graph.codes import Coded, CodeForm, Codes, grouped

_GROUP = 32


@dataclass(frozen=True)
class MXFP4(Coded):
    """packed [.., N, K / 2] or [.., N, K / 32, 16], scales [.., N, K / 32] as exponents. shape: [.., N, K]."""

    packed: Stored
    scales: Stored
    shape: tuple[int, ...]

    @property
    def form(self) -> CodeForm:
        return CodeForm("fp4", _GROUP, scales="bfloat16")  # powers of two

    def codes(self, start: int, stop: int) -> Codes:
        packed = self.packed.rows(start, stop)
        codes = nibbles(packed.reshape(*packed.shape[: len(self.shape) - 1], -1))
        return Codes(grouped(codes, _GROUP), exponents(self.scales, self.scales.rows(start, stop)))


def _read_blocks(parts: Parts) -> Coded:
    blocks = parts["codes"]
    if len(blocks.shape) not in (3, 4) or blocks.shape[-1] != _GROUP // 2 or 0 in blocks.shape:
        raise wrong_shape(blocks, f"[experts, rows, groups, {_GROUP // 2}]")
    parts.of_dtype("scale", "uint8", "float8_e8m0fnu")
    scales = parts.of_shape("scale", blocks.shape[:-1])
    return MXFP4(blocks, scales, (*blocks.shape[:-2], blocks.shape[-2] * _GROUP))


def _read_rows(parts: Parts) -> Coded:
    packed = parts["codes"]
    outer, n, half = matrix_shape(packed)
    parts.of_dtype("scale", "uint8", "float8_e8m0fnu")
    scales = parts.of_shape("scale", (*outer, n, -(-2 * half // _GROUP)))
    return MXFP4(packed, scales, (*outer, n, 2 * half))


BLOCKS = Format("mxfp4", ("uint8",), (Spelling("_blocks", {"scale": "_scales"}),), _read_blocks)
ROWS = Format("mxfp4", ("uint8",), (Spelling("_packed", {"scale": "_scale"}),), _read_rows)
