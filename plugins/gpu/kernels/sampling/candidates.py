"""The largest logits of each row, in order, and its log-sum-exp.

The C largest are among the C groups with the largest maxima: were one in another group, C larger ones would be before
it. So a row is read once, by many programs, for the maximum of each group of G; one program then chooses C groups, and
C of their C * G logits. Ties need no care: groups and logits are kept by rising id.
"""

import triton
import triton.language as tl

from moevlm.plugins.gpu.kernels.overlap import wait_for_previous

LOWEST = tl.constexpr(-(1 << 31))  # below the key of -infinity
HIGHEST = tl.constexpr((1 << 31) - 1)  # the key of NaN


@triton.jit
def keys_of(value):
    """float32 as int32 of the same order: 0 and -0 are one, NaN is the largest."""
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(key == -1, 0, key)
    return tl.where(value != value, HIGHEST, key)


@triton.jit
def choose(key, low, COUNT: tl.constexpr):
    """The COUNT largest of key [n], of equal ones the first.

    low: a key that at least COUNT are no less than. Returns whether one is chosen, its place among the chosen, and the
    least key of those.
    """
    high = tl.max(key, 0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up; the sum may be too large
        count = tl.sum((key >= middle).to(tl.int32), 0)
        # Not to `middle` but to the next key: logits of 16 bits are few values, far from each other.
        if count >= COUNT:
            low = tl.min(tl.where(key >= middle, key, HIGHEST), 0)
            high = tl.where(count == COUNT, low, high)
        else:
            high = tl.max(tl.where(key >= middle, LOWEST, key), 0)
    larger = (key > low).to(tl.int32)
    equal = (key == low).to(tl.int32)
    so_far = tl.cumsum(larger + (equal << 16), 0)
    wanted = COUNT - tl.sum(larger, 0)
    equal_so_far = so_far >> 16
    chosen = (key > low) | ((key == low) & (equal_so_far <= wanted))
    return chosen, (so_far & 0xFFFF) + tl.minimum(equal_so_far, wanted) - 1, low


@triton.jit
def group_logits(
    logits,  # [T, V] float32
    maxima,  # [T, groups] int32, written: keys
    parts,  # [T, programs of a row, 2] float32, written: a largest logit, and the sum of exp(logit - largest)
    V: tl.constexpr,
    G: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """STEP groups of a row."""
    wait_for_previous(OVERLAPS)
    GROUPS: tl.constexpr = (V + G - 1) // G
    PROGRAMS: tl.constexpr = (GROUPS + STEP - 1) // STEP
    program = tl.program_id(0)
    row = (program // PROGRAMS).to(tl.int64)
    group = program % PROGRAMS * STEP + tl.arange(0, STEP)
    column = group[:, None] * G + tl.arange(0, G)[None, :]
    value = tl.load(logits + row * V + column, mask=column < V, other=float("-inf"))
    key = tl.where(column < V, keys_of(value), LOWEST)
    tl.store(maxima + row * GROUPS + group, tl.max(key, 1), mask=group < GROUPS)
    top = tl.max(value)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(parts + 2 * program, top)
    tl.store(parts + 2 * program + 1, tl.sum(tl.exp(value - base)))


@triton.jit
def choose_logits(
    logits,  # [T, V] float32
    maxima,  # [T, groups] int32
    parts,  # [T, programs of a row, 2] float32
    chosen,  # [T, 2, C] int32, written and read: chosen groups, then chosen logits' ids
    values,  # [T, C] float32, written
    ids,  # [T, C] int32, written
    log_sum_exp,  # [T] float32, written
    V: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    STEP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_PROGRAMS: tl.constexpr,
    PADDED_C: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One row."""
    wait_for_previous(OVERLAPS)
    GROUPS: tl.constexpr = (V + G - 1) // G
    PROGRAMS: tl.constexpr = (GROUPS + STEP - 1) // STEP
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    chosen += row * (2 * C)
    slot = tl.arange(0, PADDED_C)
    if GROUPS <= C:
        group = slot
    else:
        number = tl.arange(0, PADDED_GROUPS)
        key = tl.load(maxima + row * GROUPS + number, mask=number < GROUPS, other=LOWEST)
        taken, place, least = choose(key, tl.min(key, 0), C)
        tl.store(chosen + place, number, mask=taken)
        tl.debug_barrier()
        group = tl.load(chosen + slot, mask=slot < C, other=GROUPS)
    column = tl.reshape(group[:, None] * G + tl.arange(0, G)[None, :], [PADDED_C * G])
    value = tl.load(logits + column, mask=column < V, other=0.0)
    key = tl.where(column < V, keys_of(value), LOWEST)
    # Each chosen group has a logit that is no less than the least of their maxima.
    if GROUPS <= C:
        least = tl.min(key, 0)
    taken, place, _ = choose(key, least, C)
    tl.store(chosen + C + place, column, mask=taken)
    tl.debug_barrier()
    # By rising id, so one logit's rank is the number of those that are larger, and of equal ones before it.
    column = tl.load(chosen + C + slot, mask=slot < C, other=0)
    value = tl.load(logits + column)
    key = tl.where(slot < C, keys_of(value), LOWEST)
    PART: tl.constexpr = 16 if PADDED_C > 16 else PADDED_C
    ahead = tl.zeros([PADDED_C, PART], tl.int32)
    for part in range(PADDED_C // PART):
        other = part * PART + tl.arange(0, PART)
        their_key = tl.gather(key, other, 0)[None, :]
        before = (their_key == key[:, None]) & (other[None, :] < slot[:, None])
        ahead += ((their_key > key[:, None]) | before).to(tl.int32)
    rank = tl.sum(ahead, 1)
    tl.store(values + row * C + rank, value, mask=slot < C)
    tl.store(ids + row * C + rank, column, mask=slot < C)

    part = row * PROGRAMS + tl.arange(0, PADDED_PROGRAMS)
    real = tl.arange(0, PADDED_PROGRAMS) < PROGRAMS
    top = tl.load(parts + 2 * part, mask=real, other=float("-inf"))
    total = tl.load(parts + 2 * part + 1, mask=real, other=0.0)
    highest = tl.max(top, 0)
    tl.store(log_sum_exp + row, highest + tl.log(tl.sum(total * tl.exp(top - highest), 0)))
