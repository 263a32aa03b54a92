"""Candidates as a GPU program has them: shapes, all known when the kernels are compiled."""

from dataclasses import dataclass

from moevlm.plugins.gpu.draft import MAX_TOKENS, Draft, KernelSpec, power_of_two
from moevlm.plugins.gpu.program import Argument, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, T, Tensor, at_most, per_token
from moevlm.runtime.core.errors import FieldError
from moevlm.runtime.core.names import CANDIDATES

MOST_LOGITS = 1 << 18
GROUP = 32  # logits of which the maximum is kept: one program has room for those of all groups, and 256 whole ones
STEP = 128  # groups that one program reads
WARPS = 16  # of the program that chooses


@dataclass(frozen=True)
class CandidatesOp:
    """logits [T, V] float32 -> values [T, C] float32, ids [T, C] int32, log_sum_exp [T] float32, C = min(count, V).

    See `moevlm.plugins.ops.candidates.candidates`.
    """

    vocabulary: int
    count: int = CANDIDATES

    name = "Candidates"

    def __post_init__(self) -> None:
        for field, value, most in (("vocabulary", self.vocabulary, MOST_LOGITS), ("count", self.count, CANDIDATES)):
            if not 1 <= value <= most:
                raise FieldError(field, value, f"1 to {most}")

    @property
    def columns(self) -> int:
        """C."""
        return min(self.count, self.vocabulary)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (Tensor("logits", "float32", (T, self.vocabulary)),)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return (
            Tensor("values", "float32", (T, self.columns)),
            Tensor("ids", "int32", (T, self.columns)),
            Tensor("log_sum_exp", "float32", (T,)),
        )

    def draft(self, sm: int) -> Draft:
        """See `KernelOp`."""
        groups = -(-self.vocabulary // GROUP)
        programs = -(-groups // STEP)
        sizes: dict[str, int | float | bool | str] = {
            "V": self.vocabulary,
            "G": GROUP,
            "STEP": STEP,
            "OVERLAPS": sm >= 90,
        }
        padded = {
            "C": self.columns,
            "PADDED_C": power_of_two(self.columns),
            "PADDED_GROUPS": power_of_two(groups),
            "PADDED_PROGRAMS": power_of_two(programs),
        }
        group = KernelSpec("group_logits", ("*fp32", "*i32", "*fp32"), tuple(sizes.items()))
        types = ("*fp32", "*i32", "*fp32", "*i32", "*fp32", "*i32", "*fp32")
        choose = KernelSpec("choose_logits", types, tuple((sizes | padded).items()), WARPS)
        logits = Argument("input")
        maxima, parts, chosen = (Argument("workspace", i) for i in range(3))
        outputs = (Argument("output", i) for i in range(3))
        steps = (
            Launch(0, (per_token(programs), ONE, ONE), (logits, maxima, parts)),
            Launch(1, (per_token(1), ONE, ONE), (logits, maxima, parts, chosen, *outputs), sm >= 90),
        )
        buffers = (per_token(4 * groups), per_token(8 * programs), per_token(8 * self.columns))
        variant = Variant((at_most(MAX_TOKENS),), buffers, steps)
        return Draft(self.name, self.inputs, self.outputs, sm, (group, choose), (variant,))
