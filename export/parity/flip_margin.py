"""The distance from a tie of a token that went to other experts than its reference scores say."""

import numpy as np

from moevlm.plugins.ops.router import group_scores
from moevlm.plugins.ops.spec import RouterSpec

Array = np.ndarray


def flip_margin(choice: Array, chosen: Array, spec: RouterSpec) -> float:
    """Twice the smallest change of single scores that makes the router choose `chosen`; 0 if it does so as it is.

    choice: [E], what experts are chosen by (`plugins.ops.router.choice_scores`). chosen: [k] indices in any order.
    Without groups this is the gap between the best expert left out and the worst one chosen. With groups, the chosen
    ones must also stand in groups that are kept: a sum of two scores changes twice as fast as one, so a gap between
    such sums counts half. So scores that differ by at most d make no flip with a margin above 2 d.
    Infinite if no scores lead there: an expert twice or out of range, or more groups than may be kept.
    """
    experts = len(choice)
    size = experts // spec.n_group
    if len(np.unique(chosen)) < spec.top_k or not ((chosen >= 0) & (chosen < experts)).all():
        return float("inf")
    used = np.unique(chosen // size)
    if len(used) > spec.topk_group:
        return float("inf")
    left_out = np.delete(np.arange(experts), chosen)
    best = np.full(spec.n_group, -np.inf)  # of each group's experts that were left out
    np.maximum.at(best, left_out // size, choice[left_out])
    gap = np.maximum(best - choice[chosen].min(), 0)  # what keeping that group costs
    scores = group_scores(choice[None], spec)[0] / (2 if spec.group_score == "top2_sum" else 1)
    others = np.setdiff1d(np.argsort(-scores, kind="stable"), used, assume_unique=True)  # the best group first
    free = spec.topk_group - len(used)
    margins = []
    for limit in np.unique(np.append(gap[others], 0)):
        # The groups kept beside those used: the best of those that cost no more than the limit.
        kept = np.concatenate([used, others[gap[others] <= limit][:free]]).astype(int)
        if len(kept) == spec.topk_group:
            dropped = np.delete(scores, kept)
            between = dropped.max() - scores[kept].min() if len(dropped) else 0.0
            margins.append(max(gap[kept].max(), between, 0.0))
    return float(min(margins))
