"""How far a step may be from Hugging Face, per arithmetic. All of parity's limits are here."""

from dataclasses import dataclass, replace

from moevlm.runtime.core.engine_metadata import EngineMetadata


@dataclass(frozen=True)
class Tolerance:
    """What an engine with unrounded weights may do.

    features, logits: largest absolute difference over the largest absolute value of the tensor.
    near_tie: an expert may only differ where the scores of the last chosen and the first left out are this close.
    """

    features: float
    logits: float
    near_tie: float


@dataclass(frozen=True)
class QuantizedTolerance:
    """Limits of an engine with rounded weights on a CPU, against canonical PyTorch on the same rounded weights.

    What is left there is the rounding of activations to int8. It is repeated in PyTorch on the engine's own inputs of
    each layer, so a limit is in units of what that rounding changes: an engine that rounds in all the same places is
    at 1, and one that rounds in fewer below. It depends on no model, size or number of experts. Found with AVX-512 and
    with AVX2 over 20 random models of each family, and of 9 of 130 experts: 0.9 to 1.05, of single tokens up to 1.0
    (`python -m tests.parity_seeds`). Exchanged experts, scales of another row, a missing bias are at 9 and above.

    rounding: of the root mean square over all tokens, for each layer and router, the head and each image feature.
    row: of a single token's, over its own rounding and the usual one together.
    near_tie: experts may differ from what the engine's own router logits say where choice scores are this close.
    """

    rounding: float
    row: float
    near_tie: float


@dataclass(frozen=True)
class PlanTolerance:
    """What half floats may cost a plan of TensorRT, which shows its outputs alone; see `stored_reference` for experts.

    Simulated, until a GPU confirms them: the graphs that TensorRT is given ran in onnx's reference evaluator, on ten
    random checkpoints with three sets of weights each; the worst was widened 1.5 to 2 times. Experts rounded in blocks
    of 32, held to the same rounded experts, did no worse than others.
    A token that went to other experts at a near tie cannot be told from a wrong kernel, but is rare: `kl` leaves room
    for it; `usual_kl`, in float16 hundreds of times smaller, does not.

    features, kl: as in QuantizedTolerance. usual_kl: what three of four positions stay below.
    """

    features: float
    kl: float
    usual_kl: float


@dataclass(frozen=True)
class RoundingTolerance:
    """What storing a plan's experts in blocks may cost canonical PyTorch: four times the worst that was found.

    On thirty random checkpoints of Qwen3-VL-MoE and GLM-4.5V, in blocks of 32 and 128. The small trained model of the
    demo stays within a fifth of the limits, but how far a rounded weight carries differs from model to model: hence the
    room.

    kl, usual_kl: as in PlanTolerance, against the same weights unrounded.
    """

    kl: float
    usual_kl: float


EXACT = Tolerance(features=1e-4, logits=1e-4, near_tie=1e-6)
QUANTIZED = QuantizedTolerance(rounding=1.5, row=2.0, near_tie=1e-6)
PLAN_TOLERANCES = {  # by dtype of activations
    "bfloat16": PlanTolerance(features=0.04, kl=0.12, usual_kl=0.008),
    "float16": PlanTolerance(features=0.0045, kl=0.12, usual_kl=1.6e-4),
}
# What three of four positions may lose by a quantized cache, besides: twice the worst of twenty random checkpoints.
CACHE_USUAL_KL = {"int8": 7e-5, "float8_e4m3fn": 1.5e-3}
ROUNDING = {  # by dtype of the experts
    "int8": RoundingTolerance(kl=0.04, usual_kl=1e-3),
    "fp8": RoundingTolerance(kl=0.1, usual_kl=0.015),
    "int4": RoundingTolerance(kl=0.25, usual_kl=0.22),
    "mixed": RoundingTolerance(kl=1e-6, usual_kl=1e-6),  # a checkpoint's own codes, and floats: nothing is rounded
    # Of float weights; int4's by the squared ratio of errors, 1.3. The worst of sixty random checkpoints, groups of 16
    # and 32, came to a thirtieth of it, 1.5 times what int4 did there.
    "fp4": RoundingTolerance(kl=0.33, usual_kl=0.29),
}
DECODE_STEPS = 64  # behind every prompt
ALONE_STEPS = 4  # decode steps of a prompt by itself
TEXT_TOKENS = 4096  # of a text of the user's own
CHUNK_TOKENS = 7  # small and odd, so that chunks end inside images


def tolerance_of(engine: EngineMetadata) -> Tolerance | PlanTolerance:
    """The limits of an engine that is held to transformers itself, or of a plan, by its arithmetic.

    What rounding a plan's experts costs is a limit of its own, ROUNDING.
    """
    if engine.activations == "float32":
        return EXACT
    limits = PLAN_TOLERANCES[engine.activations]
    return replace(limits, usual_kl=limits.usual_kl + CACHE_USUAL_KL.get(engine.kv_cache, 0.0))
