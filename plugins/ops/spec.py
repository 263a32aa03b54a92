"""What each op computes, as data: the attributes of its nodes in domain `moevlm`."""

from dataclasses import dataclass, fields
from typing import Any

from moevlm.runtime.core.errors import FieldError

DOMAIN = "moevlm"
OPSET_VERSION = 1
SCORINGS = ("softmax", "sigmoid", "softmax_after_topk")
GROUP_SCORES = ("max", "top2_sum")
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_clamped")
WEIGHT_SIDES = ("output", "input")


def _require(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FieldError(field, value, ", ".join(allowed))


@dataclass(frozen=True)
class RouterSpec:
    """How router logits become k experts and their weights. Field names are the op's attribute names.

    scoring: softmax over all experts, sigmoid, or softmax over the chosen logits alone.
    renormalize: divide the k weights by (their sum + epsilon).
    scale: factor on the final weights (DeepSeek-V3's routed_scaling_factor).
    n_group, topk_group, group_score: experts stand in n_group equal groups; only the best topk_group groups may be
    chosen from. A group scores its best expert (max, DeepSeek-V2) or the sum of its best two (top2_sum, DeepSeek-V3).
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    epsilon: float = 0.0
    scale: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"

    def __post_init__(self) -> None:
        _require("scoring", self.scoring, SCORINGS)
        _require("group_score", self.group_score, GROUP_SCORES)
        if self.top_k < 1:
            raise FieldError("top_k", self.top_k, "1 or more")
        if not 1 <= self.topk_group <= self.n_group:
            raise FieldError("topk_group", self.topk_group, f"1 to n_group = {self.n_group}")
        if self.scale <= 0:
            raise FieldError("scale", self.scale, "above 0")
        if self.epsilon < 0:
            raise FieldError("epsilon", self.epsilon, "0 or more")

    def check(self, experts: int) -> None:
        """Raise FieldError if a router of `experts` experts cannot choose as this spec says."""
        if experts % self.n_group:
            raise FieldError("n_group", self.n_group, f"a divisor of the {experts} experts")
        size = experts // self.n_group
        if self.n_group > 1 and self.group_score == "top2_sum" and size < 2:
            raise FieldError("group_score", self.group_score, f'"max", as a group has only {size} expert')
        if self.top_k > self.topk_group * size:
            raise FieldError("top_k", self.top_k, f"1 to the {self.topk_group * size} experts not masked out")


@dataclass(frozen=True)
class ExpertsSpec:
    """What one expert computes. Field names are the op's attribute names.

    gated: down(act(gate(x)) * up(x)), with gate rows first, then up rows, in one weight; otherwise down(act(up(x))).
    activation: silu, gelu_tanh, or swiglu_clamped (gpt-oss): gate clamped to at most `limit`, up to +-`limit`, then
    gate * sigmoid(alpha * gate) * (up + 1).
    weight_on: the router's weight scales the expert's output, or its input (Llama 4).
    """

    activation: str = "silu"
    gated: bool = True
    weight_on: str = "output"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        _require("activation", self.activation, ACTIVATIONS)
        _require("weight_on", self.weight_on, WEIGHT_SIDES)
        if self.activation == "swiglu_clamped" and not self.gated:
            raise FieldError("gated", self.gated, 'true with activation = "swiglu_clamped"')


@dataclass(frozen=True)
class AttentionSpec:
    """How queries attend to their sequence's pages of keys and values. Field names are the op's attribute names.

    rotary_dim, rotary_start: how many dimensions of a head are rotated, and the first of them; 0 for none (NoPE), and
    there are no cos and sin.
    scale: of the scores; 0 for key_dim**-0.5. window: tokens that a query sees, itself included; 0 for all before it.
    softcap: scores become softcap * tanh(scores / softcap); 0 for none.
    value_in_key: a value is the first value_dim dimensions of its key, and there is no value cache (MLA).
    value_is_key: a value is its key before norm and rotation, and there are no rows of values (Gemma 4).
    value_norm: an RMS norm of each value, without a gain.
    epsilon: of the norms, where there are any.
    chunk: positions are cut into chunks of so many, and a query sees those of its own (Llama 4); 0 for one chunk.
    """

    heads: int
    kv_heads: int
    rotary_dim: int
    rotary_start: int = 0
    scale: float = 0.0
    window: int = 0
    softcap: float = 0.0
    value_in_key: bool = False
    value_dim: int = 0
    epsilon: float = 1e-6
    value_is_key: bool = False
    value_norm: bool = False
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise FieldError("kv_heads", self.kv_heads, f"a divisor of the {self.heads} heads")
        if self.rotary_dim < 0 or self.rotary_dim % 2:
            raise FieldError("rotary_dim", self.rotary_dim, "even, 0 or more")
        for field in ("rotary_start", "scale", "window", "softcap", "chunk"):
            if (value := getattr(self, field)) < 0:
                raise FieldError(field, value, "0 or more")
        if self.value_in_key != (self.value_dim > 0):
            raise FieldError("value_dim", self.value_dim, "1 or more with value_in_key, else 0")
        for field in ("value_is_key", "value_norm"):
            if self.value_in_key and getattr(self, field):
                raise FieldError(field, True, "false with value_in_key")

    @property
    def has_values(self) -> bool:
        """Whether rows of values come beside queries and keys."""
        return not (self.value_in_key or self.value_is_key)


@dataclass(frozen=True)
class HeadLinearSpec:
    """A matrix for each head. The field is the op's attribute."""

    heads: int


@dataclass(frozen=True)
class SegmentAttentionSpec:
    """Attention among the patches of an image, rotated where there are cos and sin. The field is the op's attribute."""

    heads: int


@dataclass(frozen=True)
class CrossAttentionSpec:
    """Attention to the patches of each image, of queries that all images share. The field is the op's attribute."""

    heads: int


@dataclass(frozen=True)
class GatedDeltaSpec:
    """The gated delta rule behind a short convolution. Field names are the op's attribute names.

    key_heads: of queries and of keys; value_heads: a multiple. key_dim, value_dim: of a head.
    kernel: tokens that the convolution sees, the token itself included. scale: of the queries; 0 for key_dim**-0.5.
    epsilon: added to the squared length of queries and keys.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    scale: float = 0.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.key_heads < 1 or self.value_heads % self.key_heads:
            raise FieldError("key_heads", self.key_heads, f"a divisor of the {self.value_heads} value heads")
        for field in ("value_heads", "key_dim", "value_dim"):
            if (value := getattr(self, field)) < 1:
                raise FieldError(field, value, "1 or more")
        if self.kernel < 2:
            raise FieldError("kernel", self.kernel, "2 or more")

    @property
    def channels(self) -> int:
        """Of the convolution: all queries, keys and values of a token."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_macs(self) -> int:
        """Multiply-adds of a token with the states: what its key finds there, what it leaves, what its query finds."""
        return 3 * self.value_heads * self.key_dim * self.value_dim


def attributes(spec: Any) -> dict[str, Any]:
    """The spec, a dataclass, as ONNX node attributes: booleans become 0 or 1."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec)}
    return {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}
