"""What the manifest says of each engine: its graphs, what its weights are and cost, what a GPU's was built for."""

import msgspec

from moevlm.runtime.core.metadata import Metadata
from moevlm.runtime.core.states import PagedKV, StateSpec

MIXED = "mixed"  # dtype of experts that differ in it from layer to layer


class CostMetadata(Metadata, frozen=True):
    """What a token or a patch costs an engine.

    Bytes of weights as they are stored, and multiplications by a weight: dense for every token, expert for one expert
    in each sparse layer, head for every position whose logits are wanted.
    lookup_bytes: tables of both graphs of which a row is read, such as embeddings.
    vision_bytes: all weights of the vision graph but these. patch_macs: multiplications of a patch by a weight,
    and with a query that all images share.
    patch_pair_macs: multiplications in attention for a patch and another of its image.
    image_macs: multiplications for an image, however many patches it has.
    state_macs: multiplications of a token with recurrent states.
    image_expert_bytes: as expert_bytes, where tokens of images have experts of their own, which expert leaves out.
    """

    dense_bytes: int
    expert_bytes: int
    head_bytes: int
    dense_macs: int
    expert_macs: int
    head_macs: int
    vision_bytes: int
    patch_macs: int
    patch_pair_macs: int
    lookup_bytes: int = 0
    state_macs: int = 0
    image_expert_bytes: int = 0
    image_macs: int = 0


class TensorRTMetadata(Metadata, frozen=True):
    """What a TensorRT engine was built for.

    product: "tensorrt" or "tensorrt_rtx", whose version has to match; with version_compatible tensorrt_lean of that
    version runs it, too. sms: kinds of GPUs, 86 for compute capability 8.6. activations: dtype of activations and
    visual features, "bfloat16" or "float16" (float32 for checks).
    experts: a safetensors file inside the bundle, whose tensors are inputs of the decoder under their names; "" if the
    engine has all weights.
    Profile 0 of the decoder takes 1 to max_tokens tokens of 1 to max_sequences sequences, 1 to max_logits places in
    logits_index, and 1 to max_visual rows of features; profile 1, for decode, 1 to max_sequences of each. max_pages: of
    a cache. max_rows: of a recurrent state, 0 for a model without. max_patches: of the vision engine in one call.
    workspace: bytes that it takes beside weights and caches, an estimate.
    """

    product: str
    version: str
    sms: tuple[int, ...]
    activations: str
    experts: str
    max_sequences: int
    max_tokens: int
    max_logits: int
    max_visual: int
    max_patches: int
    max_pages: int
    max_rows: int = 0
    workspace: int = 0
    version_compatible: bool = False


class EngineMetadata(Metadata, frozen=True):
    """One engine: its graphs as paths inside the bundle, and the dtype of its weights.

    vision: "" for a model of text alone.
    states: what a sequence keeps between steps, layer by layer.
    page_size: tokens of a page of its caches; 0 where a step has one sequence, and that lies in one page.
    row_independent: a token's numbers have the same bits whatever else is in its step.
    group_size: weights that share a scale, 0 if they are not quantized. On a GPU both are of the experts; where layers
    differ, dtype is MIXED and group_size the smallest.
    operators: domain of the operators that the engine library must be given, "" if its own are enough.
    sparsity: "2:4" if two of every four weights of the dense layers were set to zero, pruned_weights in all, else "".
    recoded: of weights that a quantized checkpoint holds in codes, how many were kept or became what, in words.
    weight_errors: of those that were rounded, by the same words: root mean square of errors over that of weights.
    cost: None where it is not known. tensorrt: None for an engine on ONNX Runtime.
    built: date and time of the build, UTC, as in 2026-11-27T10:30:00Z.
    """

    vision: str
    decoder: str
    dtype: str
    states: tuple[StateSpec, ...]
    page_size: int = 0
    row_independent: bool = False
    group_size: int = 0
    operators: str = ""
    sparsity: str = ""
    pruned_weights: int = 0
    recoded: dict[str, int] = msgspec.field(default_factory=dict)
    weight_errors: dict[str, float] = msgspec.field(default_factory=dict)
    cost: CostMetadata | None = None
    tensorrt: TensorRTMetadata | None = None
    built: str = ""

    @property
    def backend(self) -> str:
        """What runs it: onnxruntime or tensorrt, see `runtime.backends.registry`."""
        return "onnxruntime" if self.tensorrt is None else "tensorrt"

    @property
    def sms(self) -> tuple[int, ...]:
        """The kinds of GPUs that it runs on; none for an engine on the CPU."""
        return () if self.tensorrt is None else self.tensorrt.sms

    @property
    def activations(self) -> str:
        """The dtype of values between layers."""
        return "float32" if self.tensorrt is None else self.tensorrt.activations

    @property
    def named_files(self) -> tuple[str, ...]:
        """The files that these metadata name, as paths inside the bundle."""
        experts = "" if self.tensorrt is None else self.tensorrt.experts
        return (*self.graphs, *((experts,) if experts else ()))

    @property
    def graphs(self) -> tuple[str, ...]:
        """The paths of its graphs: of vision, if it has that, and of the decoder."""
        return (self.vision, self.decoder) if self.vision else (self.decoder,)

    @property
    def kv_cache(self) -> str:
        """The dtype of keys and values; "" without attention."""
        return next((state.dtype for state in self.states if isinstance(state, PagedKV)), "")
