"""A roofline plot: each measured stage under what memory and arithmetic allow (Williams et al. 2009)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.installation import install_command
from moevlm.runtime.perf.latency_report import BenchReport, Limit
from moevlm.runtime.perf.machine import Machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = {"image": "^", "prompt": "s", "token": "o"}


def plot(report: BenchReport, path: Path) -> None:
    """Write a PNG. Raises EngineError without matplotlib, or if the report has no limits."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise EngineError(f"plots need matplotlib ({install_command('plot')})") from error
    if report.machine is None:
        raise EngineError("nothing to plot: this machine's limits were not measured")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    points = [
        (result.target, stage, found, measured)
        for result in report.results
        if result.graphs is None  # on a GPU, under other roofs
        for stage, found, measured in (
            ("image", result.vision_limit, result.vision and result.vision.median),
            ("prompt", result.prefill_limit, result.prefill.median),
            ("token", result.decode_limit, result.decode_token.median),
        )
        if found is not None and measured
    ]
    intensities = [found.flops / found.bytes for _, _, found, _ in points]
    _roofs(axes, report.machine, min(intensities, default=1) / 3, max(intensities, default=100) * 3)
    colours = {target: f"C{i}" for i, target in enumerate(dict.fromkeys(target for target, *_ in points))}
    for target, stage, found, seconds in points:
        _point(axes, found, seconds, f"{target}, {stage}", MARKERS[stage], colours[target])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must be read",
        ylabel="operations per second (1e9)",
        title=f"{Path(report.bundle).name}, {report.machine.threads} threads: how far from the limit",
    )
    axes.set_ylim(top=5 * report.machine.int8 / 1e9)  # room for the labels
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _roofs(axes: Axes, machine: Machine, low: float, high: float) -> None:
    roofs = [(machine.int8, "bytes", "-"), (machine.float32, "float32", "--")]
    if machine.int8 < 1.1 * machine.float32:  # two labels would lie on each other
        roofs = [(machine.int8, "bytes and float32", "-")]
    for rate, name, style in roofs:
        peak = 2 * rate
        corner = peak / machine.read
        xs = [low, corner, max(high, 2 * corner)]
        axes.plot(xs, [min(x * machine.read, peak) / 1e9 for x in xs], f"k{style}", linewidth=1)
        axes.annotate(f"{name}: {peak / 1e9:.0f}e9 / s", (xs[-1], peak / 1e9), ha="right", va="bottom", fontsize=8)
    start = (low, low * machine.read / 1e9)
    text = f"memory: {machine.read / 1e9:.1f} GB/s"
    axes.annotate(text, start, xytext=(12, 0), textcoords="offset points", fontsize=8, va="center")


def _point(axes: Axes, found: Limit, seconds: float, label: str, marker: str, colour: str) -> None:
    x, y = found.flops / found.bytes, found.flops / seconds / 1e9
    axes.plot([x], [y], marker, color=colour, label=f"{label}: {found.fraction:.0%} of the limit")
