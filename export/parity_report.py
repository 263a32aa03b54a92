"""What parity found: as data, and as a table."""

import msgspec

from moevlm.runtime.console import table
from moevlm.runtime.reports import Report


class Flip(msgspec.Struct, frozen=True):
    """A token that went to another set of experts than in transformers.

    layer: of the decoder. token: its place among all tokens of all prompts. margin: gap in choice score between the
    experts, or the groups of experts, that were exchanged, see `flip_margin`.
    """

    layer: int
    token: int
    margin: float


class Check(msgspec.Struct, frozen=True):
    """One quantity of one step against transformers.

    value, limit: relative error, KL divergence in nats, or a share or a count of what differs.
    note: what is worth knowing, or "". flips: of the check of routings, every one.
    An infinite value (another shape, NaN) is null in JSON.
    """

    step: str
    quantity: str
    value: float
    limit: float
    passed: bool
    note: str = ""
    flips: list[Flip] = []


class ParityReport(Report, frozen=True, tag="moevlm.parity/1"):
    """All checks in the order of the pipeline; the first that failed is where to look.

    pruned: engines from pruned weights. rounded: those with experts in blocks for a GPU. The checks of both are against
    canonical PyTorch on the same weights. plans: engines of TensorRT, whose routing and hidden states cannot be seen.
    left_out: engines that do not run here and why, in one line, or "".
    """

    bundle: str
    checkpoint: str
    transformers: str
    seed: int
    prompts: int
    tokens: int
    passed: bool
    checks: list[Check]
    pruned: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    left_out: str = ""


def table_of(report: ParityReport) -> str:
    """The checks, step by step, and the verdict."""
    rows: list[tuple[str, ...]] = []
    last = ""
    for check in report.checks:
        if check.step != last:
            changes = (("pruned", report.pruned), ("rounded experts", report.rounded))
            changed = ", ".join(change for change, names in changes if check.step in names)
            note = f"{changed}: against canonical PyTorch on the same weights" if changed else ""
            rows.append((check.step, "", "", "", note))
            if check.step in report.plans:
                rows.append(("  routing, hidden states", "", "", "", "not visible in a plan"))
            last = check.step
        exact = isinstance(check.limit, int)
        found, limit = f"{check.value:{'.0f' if exact else '.1e'}}", f"{check.limit:{'.0f' if exact else '.0e'}}"
        rows.append((f"  {check.quantity}", found, limit, "ok" if check.passed else "MISMATCH", check.note))
    amount = f"{report.prompts} prompts, {report.tokens} tokens, seed {report.seed}"
    title = f"against transformers {report.transformers}: {amount}"
    failed = next((check for check in report.checks if not check.passed), None)
    verdict = "passed" if failed is None else f"failed, first at {failed.step}: {failed.quantity}"
    left_out = f"left out: {report.left_out}\n" if report.left_out else ""
    return table(title, ("", "found", "limit", "", ""), rows) + f"\n\n{left_out}parity: {verdict}"
