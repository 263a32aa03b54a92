"""The softmax over blocks of scores, one after the other (Milakov and Gimelshein 2018), in powers of two.

A row keeps `top`, the largest score so far, `total`, the sum of 2 ** (score - top), and the sum of values that are
weighted with these powers. Masked scores are -inf; a row that has seen none starts from LOWEST, which no score is.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-1e30)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_of(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores of products of queries and keys, in base 2."""
    if SOFTCAP > 0:
        # tanh(z) = 2 * sigmoid(2 * z) - 1
        score = (SOFTCAP * LOG2_E) * (2 * tl.sigmoid(products * (2 * SCALE / SOFTCAP)) - 1)
    else:
        score = products * (SCALE * LOG2_E)
    return score


@triton.jit
def include(score, top, total):
    """score: [rows, BN]. Returns its powers, the new top and total, and the factor for the sum of values so far."""
    new = tl.maximum(top, tl.max(score, 1))
    factor = tl.exp2(top - new)
    power = tl.exp2(score - new[:, None])
    return power, new, total * factor + tl.sum(power, 1), factor
