"""What an engine takes of a GPU's memory, as `moevlm inspect` and `moevlm build` show it."""

from moevlm.runtime.cli.console import table
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.printable import bytes_text
from moevlm.runtime.perf.memory import CONTEXT, GpuFit, MemoryReport

_LIMIT = (
    f"tokens/s: the most that memory is fast enough for, at {CONTEXT:,} tokens a sequence; calculated, not measured"
)


def memory_text(target: str, report: MemoryReport, model: ModelMetadata) -> str:
    """Some lines of sizes, and the GPUs that the engine was built for with the cache that they have room for."""
    parts = [
        (report.dense, "weights"),
        (report.experts, "experts"),
        (report.vision, "vision"),
        (report.workspace, "working memory"),
        (report.driver, "driver"),
    ]
    listed = ", ".join(f"{bytes_text(size)} {name}" for size, name in parts if size)
    lines = [f"{target} takes {bytes_text(report.fixed)} of a GPU: {listed}"]
    if report.page:
        pages = 10**9 // report.page
        lines.append(
            f"its cache takes {bytes_text(round(report.token))} a token, {bytes_text(report.page)} a page of "
            f"{report.page_tokens} tokens; 1 GB holds {pages:,} pages, {pages * report.page_tokens:,} tokens"
        )
    if report.row:
        lines.append(
            f"its recurrent states take {bytes_text(report.row)} a request, and as much for each snapshot of them"
        )
    if report.gpus:
        heads = ("GPU", "memory", "room for", "experts on the host", "tokens/s alone", "and together")
        sparse = sum(bool(layer.experts) for layer in model.layers)
        rows = [_row(fit, sparse) for fit in report.gpus]
        lines += [table("what fits", heads, rows), _LIMIT]
    return "\n".join(lines)


def _row(fit: GpuFit, sparse_layers: int) -> tuple[str, ...]:
    if not fit.fits:
        return (fit.gpu, bytes_text(fit.memory), "does not fit", "-", "-", "-")
    host = f"{fit.host_layers} of {sparse_layers} layers" if fit.host_layers else "-"
    together = f"{fit.sequences} at once: {fit.decode_together:,.0f}"
    return (fit.gpu, bytes_text(fit.memory), f"{fit.tokens:,} tokens", host, f"{fit.decode:,.0f}", together)
