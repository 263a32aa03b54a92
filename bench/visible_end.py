"""Which later tokens of its image a token sees, drawn at random, as input `visible_end` of PagedAttention says it."""

from collections.abc import Sequence

import numpy as np


def visible_ends(sequences: Sequence[tuple[int, int]], random: np.random.RandomState, longest: int = 6) -> np.ndarray:
    """[T] int32: text and images of 2 to `longest` tokens in turn. sequences: (tokens kept, tokens in the step).

    Some ends lie below the token's own or beyond the step, which counts as the nearest that is possible.
    """
    ends = [np.zeros(0, int)]
    for context, length in sequences:
        own, is_image = np.arange(context, context + length) + 1, random.rand() < 0.5
        at = 0
        while at < length:
            stop = min(at + random.randint(2, longest + 1), length)
            if is_image:
                own[at:stop] = context + stop + (3 if stop == length and random.rand() < 0.3 else 0)
            elif random.rand() < 0.3:
                own[at:stop] = random.randint(-1, context + 1)
            at, is_image = stop, not is_image
        ends.append(own)
    return np.concatenate(ends).astype(np.int32)
