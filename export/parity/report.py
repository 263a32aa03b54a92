"""What parity found: as data, and as a table."""

import msgspec

from moevlm.runtime.cli.console import table
from moevlm.runtime.core.reports import Report


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
    compared: false where it could not be; then it counts as passed, and the note says why, and what would help.
    An infinite value (another shape, NaN) is null in JSON.
    """

    step: str
    quantity: str
    value: float
    limit: float
    passed: bool
    note: str = ""
    flips: list[Flip] = []
    compared: bool = True


class Cost(msgspec.Struct, frozen=True):
    """The distance of an engine with rounded weights from transformers in one respect. It has no limit: whether it is
    good enough is for the user to say.

    value: mean KL divergence in nats, a share, or a relative error. flips: of the share of routings, every one.
    """

    step: str
    quantity: str
    value: float
    note: str = ""
    flips: list[Flip] = []


class TextResult(msgspec.Struct, frozen=True):
    """An engine on a text. kl: mean KL(canonical PyTorch || engine), nats. same_first_choice: a share."""

    engine: str
    perplexity: float
    kl: float
    same_first_choice: float


class TextReport(msgspec.Struct, frozen=True):
    """A text of the user's own. tokens: that were used, in so many windows. perplexity: of canonical PyTorch."""

    file: str
    tokens: int
    windows: int
    perplexity: float
    engines: list[TextResult]


class ParityReport(Report, frozen=True, tag="moevlm.parity/1"):
    """All checks in the order of the pipeline; the first that failed is where to look.

    pruned: engines from pruned weights. rounded: those with experts in blocks for a GPU. The checks of both are against
    canonical PyTorch on the same weights. plans: engines of TensorRT, whose routing and hidden states cannot be seen.
    quick: few prompts and steps, and no verdict in the manifest.
    left_out: engines that do not run here and why, in one line, or "". not_compared: quantities of checks that could
    not be made; `passed` says nothing of them. costs: of quantized engines on a CPU, whose checks are against canonical
    PyTorch on the same rounded weights. text: of `--text`, else None.
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
    not_compared: tuple[str, ...] = ()
    costs: tuple[Cost, ...] = ()
    text: TextReport | None = None
    quick: bool = False


def table_of(report: ParityReport) -> str:
    """The checks, step by step, what precision costs, and the verdict."""
    rows: list[tuple[str, ...]] = []
    quantized = list(dict.fromkeys(cost.step for cost in report.costs))
    for step in dict.fromkeys(check.step for check in report.checks):
        changes = (("pruned", report.pruned), ("rounded experts", report.rounded), ("rounded weights", quantized))
        changed = ", ".join(change for change, names in changes if step in names)
        note = f"{changed}: against canonical PyTorch on the same weights" if changed else ""
        rows.append((step, "", "", "", note))
        if step in report.plans:
            rows.append(("  routing, hidden states", "", "", "", "not visible in a plan"))
        for check in (check for check in report.checks if check.step == step):
            verdict = "ok" if check.passed else "MISMATCH"
            if not check.compared:
                rows.append((f"  {check.quantity}", "-", "-", "NOT COMPARED", ""))
                continue
            rows.append((f"  {check.quantity}", _number(check.value), _number(check.limit), verdict, check.note))
        costs = [cost for cost in report.costs if cost.step == step]
        if costs:
            rows.append(("  what its precision costs", "", "", "", "against transformers, without a limit"))
        rows += [(f"    {cost.quantity}", _number(cost.value), "", "", cost.note) for cost in costs]
    amount = f"{report.prompts} prompts, {report.tokens} tokens, seed {report.seed}"
    title = f"against transformers {report.transformers}: {amount}"
    left_out = f"left out: {report.left_out}\n" if report.left_out else ""
    if report.quick:
        left_out += "left out: several images in a prompt, most decode steps; the bundle notes no verdict (--quick)\n"
    left_out += "".join(
        f"NOT COMPARED: {check.quantity}: {check.note}\n" for check in report.checks if not check.compared
    )
    shown = [table(title, ("", "found", "limit", "", ""), rows)]
    if report.text is not None:
        shown.append(_text_table(report.text))
    return "\n\n".join([*shown, f"{left_out}parity: {verdict_of(report)}"])


def _text_table(text: TextReport) -> str:
    rows = [("canonical PyTorch, float32", f"{text.perplexity:.4g}", "", "")]
    rows += [(e.engine, f"{e.perplexity:.4g}", f"{e.kl:.2g}", f"{e.same_first_choice:.1%}") for e in text.engines]
    title = f"{text.file}: its first {text.tokens} tokens, in {text.windows} window{'s' if text.windows > 1 else ''}"
    return table(title, ("", "perplexity", "KL", "same first choice"), rows)


def verdict_of(report: ParityReport) -> str:
    """In a line, and what it means where weights were rounded."""
    failed = next((check for check in report.checks if not check.passed), None)
    if failed is not None:
        return f"failed, first at {failed.step}: {failed.quantity}"
    passed = "passed"
    if report.not_compared:
        passed += f", but {' and '.join(report.not_compared)} were not compared"
    quantized = ", ".join(dict.fromkeys(cost.step for cost in report.costs))
    if not quantized:
        return passed
    return f"{passed}: the kernels of {quantized} are right; what rounding costs is shown above, without a limit"


def _number(value: float) -> str:
    return f"{value:.2g}"
