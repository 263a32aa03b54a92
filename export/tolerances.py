"""How far a step may be from Hugging Face, per arithmetic. All of parity's limits are here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """features, logits: largest absolute difference over the largest absolute value of the tensor.

    near_tie: an expert may only differ where the scores of the last chosen and the first left out are this close.
    """

    features: float
    logits: float
    near_tie: float


TOLERANCES = {"float32": Tolerance(features=1e-4, logits=1e-4, near_tie=1e-6)}
GREEDY_TOKENS = 64
ALONE_STEPS = 4  # decode steps of a prompt by itself
CHUNK_TOKENS = 7  # small and odd, so that chunks end inside images
