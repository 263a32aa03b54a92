"""The router: from logits to k experts and their weights, one token to a program.

The product that makes the logits is not part of it. For 128 experts of 2,048 columns its weights are 1 MiB in float32:
0.3 us of an H100's memory if every multiprocessor reads, 10 us for one program. So it takes several programs, of which
the last to finish, found by a counter in memory, reads what the others wrote: two trips to the L2 cache and a fence, as
much as the 1 to 1.5 us that one launch less saves.
"""

import triton
import triton.language as tl


@triton.jit
def route(
    logits,  # [T, E] float32
    bias,  # [E] float32 or null
    expert_scale,  # [E] float32 or null
    index,  # [T, k] int32, written
    weight,  # [T, k] float32, written
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    """Experts are laid out as [groups, experts of a group], both padded to powers of two."""
    SIZE: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED_GROUPS)
    member = tl.arange(0, PADDED_SIZE)
    expert = group[:, None] * SIZE + member[None, :]
    real = (group[:, None] < GROUPS) & (member[None, :] < SIZE)
    lowest = float("-inf")
    score = tl.load(logits + token * EXPERTS + expert, mask=real, other=lowest)
    if SCORING == "softmax":
        power = tl.exp(score - tl.max(score))
        score = power / tl.sum(power)
    elif SCORING == "sigmoid":
        small = tl.exp(-tl.abs(score))  # of a magnitude: never too large
        score = tl.where(score >= 0, 1 / (1 + small), small / (1 + small))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    free = real
    if GROUPS > 1:
        best = tl.where(real, choice, lowest)
        of_group = tl.max(best, 1)
        if GROUP_SCORE == "top2_sum":
            first = tl.min(tl.where(best == of_group[:, None], member[None, :], PADDED_SIZE), 1)
            of_group += tl.max(tl.where(member[None, :] == first[:, None], lowest, best), 1)
        kept = group < 0
        for _ in tl.static_range(TOP_GROUPS):
            left = (group < GROUPS) & (kept == 0)
            highest = tl.max(tl.where(left, of_group, lowest))
            kept = kept | (group == tl.min(tl.where(left & (of_group == highest), group, PADDED_GROUPS)))
        free = free & kept[:, None]
    slot = tl.arange(0, PADDED_K)
    chosen = tl.zeros([PADDED_K], tl.int32)
    value = tl.full([PADDED_K], lowest, tl.float32)
    for j in tl.static_range(TOP_K):
        highest = tl.max(tl.where(free, choice, lowest))
        # Logits that are not numbers match nothing: the last expert then, so that an index is always one.
        e = tl.minimum(tl.min(tl.where(free & (choice == highest), expert, EXPERTS)), EXPERTS - 1)
        taken = real & (expert == e)
        free = free & (expert != e)
        chosen = tl.where(slot == j, e, chosen)
        value = tl.where(slot == j, tl.max(tl.where(taken, score, lowest)), value)
    if SCORING == "softmax_after_topk":
        value = tl.exp(value - tl.max(value))
        value = value / tl.sum(value)
    value = tl.where(slot < TOP_K, value, 0.0)
    if RENORMALIZE:
        value = value / (tl.sum(value) + EPSILON)
    value *= SCALE
    if HAS_SCALE:
        value *= tl.load(expert_scale + chosen)
    tl.store(index + token * TOP_K + slot, chosen, mask=slot < TOP_K)
    tl.store(weight + token * TOP_K + slot, value, mask=slot < TOP_K)
