"""What a TensorRT engine is built for, beyond its target's name."""

from dataclasses import dataclass

from moevlm.export.backends.options import Option, check_choices, group_size, option, sparsity
from moevlm.export.formats.gpu_packing import LAYOUT
from moevlm.export.formats.registry import FORMATS
from moevlm.runtime.core import defaults, dtypes
from moevlm.runtime.core.errors import BuildError

NAMES = ("rtx:smNN,...", "trt:smNN")
DTYPES = {row.short: row.name for row in (dtypes.DTYPES["bfloat16"], dtypes.DTYPES["float16"])}
EXPERTS = ("same", *FORMATS)
MIN_LOGITS = 64


def _both(told: str, choices: tuple[str, ...] = ()) -> Option:
    return Option(f"rtx, trt: {told}", "rtx and trt targets", choices=choices)


def _trt(told: str) -> Option:
    return Option(told, "trt targets", lambda target, _: target.startswith("trt"))


@dataclass(frozen=True)
class Options:
    """dtype: of weights and activations. experts: how the experts' weights are stored, in groups of `group_size`.

    capacity: tokens in the cache of a sequence. max_batch: sequences in a step. chunk_tokens: of each in prefill.
    version_compatible: plans for the lean runtime of that TensorRT, too. native_moe: TensorRT's own MoE layer.
    sparsity: "2:4" lets it use sparse kernels on pruned weights. Raises BuildError, naming a value and what is allowed.
    """

    dtype: str = option("bf16", _both("dtype of weights and activations.", tuple(DTYPES)))
    experts: str = option(
        "same", _both("how the experts' weights are stored, as the others are, or quantized.", EXPERTS)
    )
    group_size: int = group_size(lambda _, values: values["experts"] != "same")
    capacity: int = option(4096, _both("tokens in a sequence's KV cache, at most the model's context."))
    max_batch: int = option(8, _both("sequences in a step."))
    chunk_tokens: int = option(defaults.CHUNK_TOKENS, _both("prompt tokens in a step."))
    version_compatible: bool = option(False, _trt("trt: plans for its lean runtime, too."))
    native_moe: bool = option(False, _trt("trt on sm100, sm103, sm110: TensorRT's own MoE layer."))
    sparsity: str = sparsity()

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in (("max batch", self.max_batch), ("chunk tokens", self.chunk_tokens)):
            if value < 1:
                raise BuildError(f"unsupported {name} {value} (allowed: 1 or more)")
        if self.capacity < self.chunk_tokens:
            raise BuildError(
                f"unsupported capacity {self.capacity} (allowed: the {self.chunk_tokens} tokens of a chunk, or more)"
            )

    @property
    def activations(self) -> str:
        """Of activations and caches, as numpy names it."""
        return DTYPES[self.dtype]

    @property
    def weights(self) -> str:
        """Of the experts, as in `ExpertsOp`."""
        return "" if self.experts == "same" else self.experts

    @property
    def precision(self) -> str:
        """bf16, or bf16-int4."""
        return f"{self.dtype}-{self.weights}" if self.weights else self.dtype

    @property
    def experts_path(self) -> str:
        """The file with the experts' weights, the same for all GPUs.

        A bundle that has it keeps it: another layout of the weights needs another name.
        """
        stored = f"-g{self.group_size}-v{LAYOUT}" if self.weights else ""
        return f"experts/{self.precision}{stored}.safetensors"

    @property
    def max_logits(self) -> int:
        """A place costs a row of the vocabulary in float32, and a step wants one of each sequence."""
        return max(self.max_batch, MIN_LOGITS)

    @property
    def max_visual(self) -> int:
        """Rows of visual embeddings: as many as a step has tokens."""
        return self.max_batch * self.chunk_tokens
