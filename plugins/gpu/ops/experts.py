"""Experts as a GPU program has them: attributes, shapes and dtypes, all known when the kernels are compiled."""

import math
from dataclasses import dataclass

from moevlm.plugins.gpu.draft import MAX_TOKENS, Draft
from moevlm.plugins.gpu.ops.experts_draft import ExpertsDraft
from moevlm.plugins.gpu.ops.projection import FORMATS, SCALES_PER_WORD, Projection
from moevlm.plugins.gpu.sizes import T, Tensor
from moevlm.plugins.ops.spec import ExpertsSpec
from moevlm.runtime.core.dtypes import DTYPES, E4M3
from moevlm.runtime.core.errors import FieldError

ACTIVATION_DTYPES = ("float16", "bfloat16", "float32")
GROUP_SIZES = {"": (32, 128), "int8": (32, 128), "int4": (32, 128), "fp8": (32, 128), "fp4": (16, 32, 128)}  # rising
SCALE_DTYPES = ("float16", "float32")  # beside that of activations
NVFP4_GROUP = 16  # of fp4 alone, and with E4M3 scales alone


@dataclass(frozen=True)
class ExpertsOp:
    """x [T, H], routing and weights -> y [T, H], both in `dtype`; see `moevlm.plugins.ops.experts.experts`.

    weights: "" for `dtype`, or "int8", "int4", "fp8" (e4m3), "fp4" (e2m1), in groups of `group_size` values along the
    input axis, the last one short where `group_size` does not divide it. scales: the dtype of a group's scale, "" for
    `dtype`; zeros: an int4 group has a zero of its own. A weight is (code - zero) * scale, rounded to `dtype` once.
    fp4 in groups of NVFP4_GROUP has E4M3 scales and a float32 scale of each row: its weights, code * scale, are not
    rounded, and what they yield is multiplied by the row's scale in float32.
    How they are stored: see `moevlm.export.formats.gpu_packing`.
    """

    spec: ExpertsSpec
    experts: int
    top_k: int
    hidden: int
    inner: int
    dtype: str = "bfloat16"
    weights: str = ""
    group_size: int = 32
    has_biases: bool = False
    scales: str = ""
    zeros: bool = False

    name = "MoEExperts"

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("dtype", self.dtype, ACTIVATION_DTYPES),
            ("weights", self.weights, tuple(FORMATS)),
            ("group_size", self.group_size, GROUP_SIZES.get(self.weights, ())),
            ("scales", self.scales, (E4M3,) if self.group_size == NVFP4_GROUP else ("", self.dtype, *SCALE_DTYPES)),
            ("zeros", self.zeros, (False, True) if self.weights == "int4" else (False,)),
        ):
            if value not in allowed:
                raise FieldError(field, value, ", ".join(map(repr, allowed)))

    @property
    def weight_bits(self) -> int:
        """Of one stored weight."""
        return DTYPES[FORMATS[self.weights] or self.dtype].bits

    @property
    def weight_bytes(self) -> int:
        """Of all experts' weights, their scales and biases."""
        stored = [tensor for tensor in self.inputs if tensor.name.startswith(("gate_up", "down"))]
        return sum(math.prod(tensor.at({})) * DTYPES[tensor.dtype].bytes for tensor in stored)

    @property
    def form(self) -> tuple[str, int, str]:
        """Name, group size and dtype of scales of the format of quantized weights."""
        return self.weights, self.group_size, self.scales or self.dtype

    @property
    def row_scales(self) -> bool:
        """Whether rows of weights have scales, too."""
        return self.scales == E4M3

    @property
    def rows(self) -> int:
        """Rows of gate_up: 2I, or I if the experts are not gated."""
        return self.inner * (2 if self.spec.gated else 1)

    @property
    def projections(self) -> dict[str, Projection]:
        """gate_up and down, of one expert."""
        shapes = {"gate_up": (self.rows, self.hidden), "down": (self.hidden, self.inner)}
        group = SCALES_PER_WORD * self.group_size if self.row_scales else self.group_size
        return {
            name: Projection.of(*shape, self.weights, group, self.has_biases, self.zeros, self.row_scales)
            for name, shape in shapes.items()
        }

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        tokens = (T, self.top_k)
        tensors = [
            Tensor("x", self.dtype, (T, self.hidden)),
            Tensor("expert_index", "int32", tokens),
            Tensor("expert_weight", "float32", tokens),
        ]
        for name, weight in self.projections.items():
            dtype, shape = weight.stored(self.dtype)
            tensors.append(Tensor(name, dtype, (self.experts, *shape)))
        if self.weights:
            scales = "int32" if self.row_scales else self.scales or self.dtype
            tensors += [
                Tensor(f"{name}_scale", scales, (self.experts, weight.groups, weight.scale_rows))
                for name, weight in self.projections.items()
            ]
        if self.row_scales:
            tensors += [
                Tensor(f"{name}_row_scale", "float32", (self.experts, weight.rows))
                for name, weight in self.projections.items()
            ]
        if self.zeros:
            tensors += [
                Tensor(f"{name}_zero", "int32", (self.experts, weight.groups, weight.zero_words))
                for name, weight in self.projections.items()
            ]
        if self.has_biases:
            tensors += [
                Tensor(f"{name}_bias", self.dtype, (self.experts, weight.rows))
                for name, weight in self.projections.items()
            ]
        return tuple(tensors)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (Tensor("y", self.dtype, (T, self.hidden)),)

    def draft(self, sm: int, max_tokens: int = MAX_TOKENS) -> Draft:
        """See `KernelOp`; for up to max_tokens. Raises ValueError for bfloat16 on sm75, which has none."""
        return ExpertsDraft(self, sm, max_tokens).draft()
