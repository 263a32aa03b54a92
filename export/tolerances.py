"""How far a step may be from Hugging Face, per arithmetic. All of parity's limits are here."""

from dataclasses import dataclass

from moevlm.runtime.manifest import EngineFacts


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
class RoundedTolerance:
    """What rounding may cost an engine that shows no more than its outputs: a plan of TensorRT.

    features: root mean square of the difference over that of the tensor, for image features.
    kl: mean over positions of KL(transformers || engine), in nats.
    """

    features: float
    kl: float


@dataclass(frozen=True)
class QuantizedTolerance(RoundedTolerance):
    """What rounding the weights may cost: 1.5 to 2 times the worst that was found.

    Parity ran on ten random checkpoints of a few thousand weights, where one exchanged expert changes everything, with
    each of the four quantized engines; the worst value of each quantity at 8 and at 4 bits was widened that much. They
    find a wrong kernel; how good a model still is, the values themselves say.

    hidden: as features, for hidden states.
    flips: share of the tokens, layer by layer, that go to another set of experts.
    near_tie: of those, the widest gap in choice score between the experts that were exchanged.
    """

    hidden: float
    flips: float
    near_tie: float


TOLERANCES: dict[str, Tolerance | QuantizedTolerance] = {
    "float32": Tolerance(features=1e-4, logits=1e-4, near_tie=1e-6),
    "int8": QuantizedTolerance(features=0.06, hidden=0.4, kl=0.4, flips=0.2, near_tie=0.6),
    "int4": QuantizedTolerance(features=0.06, hidden=0.9, kl=3.0, flips=0.6, near_tie=1.0),
}
# Of plans, by dtype of activations and of the experts' weights. SIMULATED: TODO
PLAN_TOLERANCES = {
    ("bfloat16", "bfloat16"): RoundedTolerance(features=0.04, kl=0.1),
}
GREEDY_TOKENS = 64
ALONE_STEPS = 4  # decode steps of a prompt by itself
CHUNK_TOKENS = 7  # small and odd, so that chunks end inside images


def tolerance_of(engine: EngineFacts) -> Tolerance | RoundedTolerance:
    """By the arithmetic of its activations and its weights."""
    if engine.tensorrt is None or engine.tensorrt.activations == "float32":
        return TOLERANCES[engine.dtype]
    return PLAN_TOLERANCES[engine.tensorrt.activations, engine.dtype]
