"""The softmax over blocks of scores, one after the other (Milakov and Gimelshein 2018), in powers of two.

A row keeps `top`, the largest score so far, `total`, the sum of 2 ** (score - top), and the sum of values that are
weighted with these powers. Masked scores are -inf; a row that has seen none starts from LOWEST, which no score is.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-1e30)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_of(products, H: tl.constexpr):
    """Scores of products of queries and keys, in base 2."""
    if H.softcap > 0:
        # tanh(z) = 2 * sigmoid(2 * z) - 1
        score = (H.softcap * LOG2_E) * (2 * tl.sigmoid(products * (2 * H.scale / H.softcap)) - 1)
    else:
        score = products * (H.scale * LOG2_E)
    return score


@triton.jit
def include(score, top, total):
    """score: [rows, BN]. Returns its powers, the new top and total, and the factor for the sum of values so far."""
    new = tl.maximum(top, tl.max(score, 1))
    factor = tl.exp2(top - new)
    power = tl.exp2(score - new[:, None])
    return power, new, total * factor + tl.sum(power, 1), factor


@triton.jit
def start_rows(sinks, query_head, mask, has_sink, BM: tl.constexpr, H: tl.constexpr):
    """top and total of a program's rows before any key. has_sink: whether it has the heads' sinks."""
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    if H.has_sinks:
        sink = tl.load(sinks + query_head, mask=mask, other=0.0) * LOG2_E
        top = tl.where(has_sink, sink, top)
        total = tl.where(has_sink, 1.0, total)
    return top, total
