"""What parity found: as data, as a table, as JSON."""

import msgspec

from moevlm.runtime.console import console, table


class Check(msgspec.Struct, frozen=True):
    """One quantity of one step against transformers.

    value, limit: relative error, or a count of tokens that differ. note: what is worth knowing, or "".
    """

    step: str
    quantity: str
    value: float
    limit: float
    passed: bool
    note: str = ""


class ParityReport(msgspec.Struct, frozen=True, tag_field="schema", tag="moevlm.parity/1"):
    """All checks in the order of the pipeline; the first that failed is where to look."""

    bundle: str
    checkpoint: str
    transformers: str
    seed: int
    prompts: int
    tokens: int
    passed: bool
    checks: list[Check]


def to_json(report: ParityReport) -> str:
    """Indented JSON text."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def show(report: ParityReport) -> None:
    """Print the table and the verdict."""
    rows, last = [], None
    for check in report.checks:
        value = f"{check.value:.1e}" if isinstance(check.limit, float) else f"{check.value:.0f}"
        limit = f"{check.limit:.0e}" if isinstance(check.limit, float) else f"{check.limit}"
        verdict = "ok" if check.passed else "MISMATCH"
        rows.append((check.step if check.step != last else "", check.quantity, value, limit, verdict, check.note))
        last = check.step
    amount = f"{report.prompts} prompts, {report.tokens} tokens, seed {report.seed}"
    title = f"against transformers {report.transformers}: {amount}"
    console().print(table(title, ("step", "quantity", "found", "limit", "", ""), rows))
    failed = next((check for check in report.checks if not check.passed), None)
    if failed is None:
        console().print("parity: passed")
    else:
        console().print(f"parity: failed, first at {failed.step}: {failed.quantity}")
