"""The router as a GPU program has it: attributes and shapes, all known when the kernel is compiled."""

from dataclasses import dataclass

from moevlm.plugins.gpu.draft import MAX_TOKENS, Draft, KernelSpec, power_of_two
from moevlm.plugins.gpu.program import Argument, Launch, Variant
from moevlm.plugins.gpu.sizes import ONE, T, Tensor, at_most, per_token
from moevlm.plugins.ops.spec import RouterSpec


@dataclass(frozen=True)
class RouterOp:
    """logits [T, E], bias [E] and expert_scale [E] if there are any -> expert_index [T, k] int32, expert_weight [T, k].

    All but the index are float32.
    """

    spec: RouterSpec
    experts: int
    has_bias: bool = False
    has_scale: bool = False

    name = "MoERouter"

    def __post_init__(self) -> None:
        self.spec.check(self.experts)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        optional = {"bias": self.has_bias, "expert_scale": self.has_scale}
        per_expert = [Tensor(name, "float32", (self.experts,)) for name, given in optional.items() if given]
        return (Tensor("logits", "float32", (T, self.experts)), *per_expert)

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
            "HAS_SCALE": self.has_scale,
            "PADDED_GROUPS": power_of_two(spec.n_group),
            "PADDED_SIZE": power_of_two(size),
            "PADDED_K": power_of_two(spec.top_k),
        }
        types = ("*fp32", "*fp32", "*fp32", "*i32", "*fp32")
        kernel = KernelSpec("route", types, tuple(constants.items()), warps=1)
        places = {tensor.name: Argument("input", i) for i, tensor in enumerate(self.inputs)}
        given = [places.get(name, Argument("null")) for name in ("logits", "bias", "expert_scale")]
        arguments = (*given, Argument("output", 0), Argument("output", 1))
        launch = Launch(0, (per_token(1), ONE, ONE), arguments)
        variant = Variant((at_most(max_tokens),), (), (launch,))
        return Draft(self.name, self.inputs, self.outputs, sm, (kernel,), (variant,))
