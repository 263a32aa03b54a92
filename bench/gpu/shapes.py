"""MoE layers as real models have them, and the fewest bytes and operations that one takes."""

import math
from dataclasses import dataclass

from moevlm.plugins.gpu.ops.experts import ExpertsOp
from moevlm.plugins.gpu.ops.router import RouterOp
from moevlm.plugins.gpu.sizes import Tensor
from moevlm.plugins.ops.spec import ExpertsSpec, RouterSpec
from moevlm.runtime.core.dtypes import DTYPES


@dataclass(frozen=True)
class Layer:
    """A router of `experts` experts and the experts, each with `inner` rows in gate and in up."""

    name: str
    hidden: int
    inner: int
    experts: int
    router: RouterSpec
    activation: str = "silu"
    has_bias: bool = False
    has_scale: bool = False

    @property
    def router_op(self) -> RouterOp:
        return RouterOp(self.router, self.experts, self.has_bias, self.has_scale)

    def experts_op(self, dtype: str = "bfloat16", weights: str = "", group_size: int = 0) -> ExpertsOp:
        """The experts with activations in dtype and weights as ExpertsOp names them.

        group_size: 0 for 32, and for 128 in fp8, of which alone activations are multiplied in e4m3, too.
        """
        return ExpertsOp(
            spec=ExpertsSpec(activation=self.activation),
            experts=self.experts,
            top_k=self.router.top_k,
            hidden=self.hidden,
            inner=self.inner,
            dtype=dtype,
            weights=weights,
            group_size=group_size or (128 if weights == "fp8" else 32),
        )


LAYERS = (
    # Qwen/Qwen3-VL-30B-A3B-Instruct, text_config.
    Layer("Qwen3-VL-30B-A3B", 2048, 768, 128, RouterSpec(top_k=8)),
    # google/gemma-4-26B-A4B-it, text_config.
    Layer("Gemma-4-26B-A4B", 2816, 704, 128, RouterSpec(top_k=8), activation="gelu_tanh", has_scale=True),
    # deepseek-ai/DeepSeek-V3: sigmoid, a correction bias, 4 of 8 groups.
    Layer(
        "DeepSeek-V3-like",
        7168,
        2048,
        256,
        RouterSpec(8, "sigmoid", True, 1e-20, 2.5, n_group=8, topk_group=4, group_score="top2_sum"),
        has_bias=True,
    ),
)
TOKEN_COUNTS = tuple(1 << n for n in range(13))


def tensor_bytes(tensor: Tensor, tokens: int) -> int:
    """Bytes of an op's input or output for so many tokens."""
    return math.prod(tensor.at({"T": tokens})) * DTYPES[tensor.dtype].bytes


def weight_bytes(op: ExpertsOp, active: int) -> int:
    """Bytes of the weights, scales and biases of so many experts, each read once."""
    return op.weight_bytes // op.experts * active


def operations(op: ExpertsOp, tokens: int) -> int:
    """Floating-point operations of the products: 2 for each weight of each token's experts."""
    return 2 * tokens * op.top_k * (op.rows + op.inner) * op.hidden


@dataclass(frozen=True)
class Limits:
    """What the GPU was measured at: bytes/s of a copy, read and written ones counted; FLOP/s of a large product."""

    bandwidth: float
    peak: float

    def of_bandwidth(self, bytes_read: float, seconds: float) -> float:
        """Which part of the bandwidth reading so much in so long is."""
        return bytes_read / seconds / self.bandwidth

    def of_peak(self, operations: float, seconds: float) -> float:
        """Which part of the peak so many operations in so long are."""
        return operations / seconds / self.peak
