"""The router as a GPU program has it: attributes and shapes, all known when the kernel is compiled."""

from dataclasses import dataclass

from moevlm.plugins.gpu.draft import MAX_TOKENS, Draft, KernelSpec, power_of_two
from moevlm.plugins.gpu.program import Argument, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, T, Tensor, at_most, per_token
from moevlm.plugins.ops.spec import RouterSpec


@dataclass(frozen=True)
class RouterOp:
    """logits [T, E], bias [E] if has_bias -> expert_index [T, k] int32, expert_weight [T, k]; else float32."""

    spec: RouterSpec
    experts: int
    has_bias: bool = False

    name = "MoERouter"

    def __post_init__(self) -> None:
        self.spec.check(self.experts)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        logits = Tensor("logits", "float32", (T, self.experts))
        return (logits, Tensor("bias", "float32", (self.experts,))) if self.has_bias else (logits,)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        shape = (T, self.spec.top_k)
        return Tensor("expert_index", "int32", shape), Tensor("expert_weight", "float32", shape)

    def draft(self, sm: int, max_tokens: int = MAX_TOKENS) -> Draft:
        """See `KernelOp`; for up to max_tokens."""
        spec = self.spec
        size = self.experts // spec.n_group
        constants: dict[str, int | float | bool | str] = {
            "EXPERTS": self.experts,
            "TOP_K": spec.top_k,
            "SCORING": spec.scoring,
            "RENORMALIZE": spec.renormalize,
            "EPSILON": spec.epsilon,
            "SCALE": spec.scale,
            "GROUPS": spec.n_group,
            "TOP_GROUPS": spec.topk_group,
            "GROUP_SCORE": spec.group_score,
            "HAS_BIAS": self.has_bias,
            "PADDED_GROUPS": power_of_two(spec.n_group),
            "PADDED_SIZE": power_of_two(size),
            "PADDED_K": power_of_two(spec.top_k),
        }
        kernel = KernelSpec("route", ("*fp32", "*fp32", "*i32", "*fp32"), tuple(constants.items()), warps=1)
        bias = Argument("input", 1) if self.has_bias else Argument("null")
        arguments = (Argument("input", 0), bias, Argument("output", 0), Argument("output", 1))
        launch = Launch(0, (per_token(1), ONE, ONE), arguments)
        variant = Variant((at_most(max_tokens),), (), (launch,))
        return Draft(self.name, self.inputs, self.outputs, sm, (kernel,), (variant,))
