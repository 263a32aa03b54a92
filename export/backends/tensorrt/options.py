"""What a TensorRT engine is built for, beyond its target's name."""

from dataclasses import dataclass, replace

from moevlm.export.backends.options import Option, check_choices, group_size, option, sparsity
from moevlm.export.formats.gpu_packing import LAYOUT
from moevlm.export.formats.registry import FORMATS
from moevlm.runtime.core import defaults, dtypes
from moevlm.runtime.core.engine_metadata import MIXED
from moevlm.runtime.core.errors import RefusedBuildOption

NAMES = ("rtx:smNN,...", "trt:smNN")
PLANNED = (
    "rtx:sm80,sm86,sm89,sm120,sm121",
    "trt:sm90,sm100",
)
DTYPES = {row.short: row.name for row in (dtypes.DTYPES["bfloat16"], dtypes.DTYPES["float16"])}
AUTO, SAME = "auto", "same"
EXPERTS = (AUTO, SAME, *FORMATS)
# --kv-cache: as PagedAttentionOp names it, and as a state's dtype.
CACHES = {"same": ("", ""), "int8": ("int8", "int8"), "fp8": ("fp8", "float8_e4m3fn")}
MIN_LOGITS = 64
_EXPERTS = (
    "how the experts' weights are stored: auto, by default, as the checkpoint holds them where that is in one of these "
    "formats, else as the other weights are; same, as these are; or in a format."
)
_GROUP_SIZE = "rtx, trt: with --experts, in fp4 16, too; by default the checkpoint's where its codes are kept, else 32."
_GROUP_SIZES = (16, 32, 128)
_KV_CACHE = (
    "keys and values as the activations are (same, by default), or int8 or fp8 with a scale per token and head: half "
    "the memory, and half of what a long context reads; GPUs before sm89 decode fp8 in software: int8 is faster there."
)


def _both(told: str, choices: tuple[str, ...] = ()) -> Option:
    return Option(f"rtx, trt: {told}", "rtx and trt targets", choices=choices)


def _trt(told: str) -> Option:
    return Option(told, "trt targets", lambda target, _: target.startswith("trt"))


@dataclass(frozen=True)
class Options:
    """dtype: of weights and activations. experts: how the experts' weights are stored, in groups of `group_size`.

    AUTO and a group_size of 0 leave it to the checkpoint: `expert_formats.chosen` replaces them, AUTO by MIXED where
    layers differ.
    kv_cache: the dtype of activations, or quantized, with a scale per token and head. max_sequences: in a step.
    chunk_tokens: prompt tokens in a step, beside one of each other sequence.
    version_compatible: engines for the lean runtime of that TensorRT, too. native_moe: TensorRT's own MoE layer.
    sparsity: "2:4" lets it use sparse kernels on pruned weights. Raises RefusedBuildOption.
    """

    dtype: str = option("bf16", _both("dtype of weights and activations.", tuple(DTYPES)))
    experts: str = option(AUTO, _both(_EXPERTS, EXPERTS))
    group_size: int = group_size(lambda _, values: values["experts"] not in (AUTO, SAME), _GROUP_SIZE, _GROUP_SIZES)
    kv_cache: str = option("same", _both(_KV_CACHE, tuple(CACHES)))
    max_sequences: int = option(64, _both("sequences in a step."))
    chunk_tokens: int = option(
        2048, _both("prompt tokens in a step, beside one of each other sequence; at most the model's context.")
    )
    version_compatible: bool = option(False, _trt("trt: engines for its lean runtime, too."))
    native_moe: bool = option(False, _trt("trt on sm100, sm103, sm110: TensorRT's own MoE layer."))
    sparsity: str = sparsity()

    def __post_init__(self) -> None:
        check_choices(replace(self, experts=AUTO) if self.experts == MIXED else self)
        if self.group_size == 16 and self.experts not in ("fp4", AUTO, MIXED):
            raise RefusedBuildOption("group_size", 16, f"32 or 128, for {self.experts} experts")
        for name, value in (("max_sequences", self.max_sequences), ("chunk_tokens", self.chunk_tokens)):
            if value < 1:
                raise RefusedBuildOption(name, value, "a whole number, 1 or more")

    @property
    def activations(self) -> str:
        """Of activations, as numpy names it."""
        return DTYPES[self.dtype]

    @property
    def weights(self) -> str:
        """Of the experts, as in `ExpertsOp`, or MIXED."""
        return "" if self.experts in (AUTO, SAME) else self.experts

    @property
    def group(self) -> int:
        """The group size of experts."""
        return self.group_size or defaults.GROUP_SIZE

    @property
    def cache(self) -> str:
        """How caches are quantized, as in `PagedAttentionOp`; "" for the dtype of activations."""
        return CACHES[self.kv_cache][0]

    @property
    def cache_dtype(self) -> str:
        """Of keys and values, as in `PagedKV`."""
        return CACHES[self.kv_cache][1] or self.activations

    @property
    def precision(self) -> str:
        """bf16, or bf16-int4."""
        return f"{self.dtype}-{self.weights}" if self.weights else self.dtype

    @property
    def experts_path(self) -> str:
        """The file with the experts' weights, the same for all GPUs.

        A bundle that has it keeps it: another layout of the weights needs another name.
        """
        stored = (f"-g{self.group}" * (self.weights != MIXED) + f"-v{LAYOUT}") if self.weights else ""
        return f"experts/{self.precision}{stored}.safetensors"

    @property
    def max_tokens(self) -> int:
        """Of a step: a chunk of prompts, and one token of each sequence."""
        return self.chunk_tokens + self.max_sequences

    @property
    def max_logits(self) -> int:
        """A place costs a row of the vocabulary in float32, and a step wants one of each sequence."""
        return max(self.max_sequences, MIN_LOGITS)
