"""How far a step may be from Hugging Face, per arithmetic. All of parity's limits are here."""

from dataclasses import dataclass


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
    """What rounding the weights may cost; the limits are a few times what random checkpoints show.

    features: root mean square of the difference over that of the tensor, for image features and hidden states.
    kl: mean over positions of KL(transformers || engine), nats.
    flips: share of the tokens, layer by layer, that go to another set of experts.
    near_tie: of those, the widest allowed gap in choice score between the experts that were exchanged.
    """

    features: float
    kl: float
    flips: float
    near_tie: float


TOLERANCES = {
    "float32": Tolerance(features=1e-4, logits=1e-4, near_tie=1e-6),
    "int8": QuantizedTolerance(features=0.05, kl=0.02, flips=0.1, near_tie=0.1),
    "int4": QuantizedTolerance(features=0.5, kl=0.5, flips=0.6, near_tie=0.5),
}
GREEDY_TOKENS = 64
ALONE_STEPS = 4  # decode steps of a prompt by itself
CHUNK_TOKENS = 7  # small and odd, so that chunks end inside images
