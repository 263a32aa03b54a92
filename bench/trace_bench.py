"""What tracing and lowering cost with 8, 64 and 256 experts a layer: neither nodes nor seconds should grow.

    python -m bench.trace_bench [--json bench/results/trace.json]

From config.json alone: no weights are made. Each is traced three times; the median counts.
"""

import json
from pathlib import Path
from statistics import median
from time import perf_counter

import click
from rich.progress import track

from bench.random_checkpoint import config
from moevlm.export.backends.registry import targets
from moevlm.export.build import traced
from moevlm.export.dry_run import Absent
from moevlm.export.model import CanonicalModel
from moevlm.runtime.cli.console import console, table

SHAPE = {"layers": 12, "hidden": 2048, "top_k": 8, "width": 512, "vocabulary": 151936}
EXPERTS, TARGET, ROUNDS = (8, 64, 256), "cpu:int4", 3


def measure(experts: int) -> dict[str, float]:
    """Nodes of the decoder, as traced and as lowered, and seconds."""
    (target,) = targets([TARGET], {})
    traces, lowerings = [], []
    for _ in range(ROUNDS):
        started = perf_counter()
        graphs = traced(CanonicalModel.of_config(config(experts=experts, **SHAPE), Absent), lambda *_: None)
        traces.append(perf_counter() - started)
        started = perf_counter()
        lowered = target.lower(graphs["decoder"], "decoder")
        lowerings.append(perf_counter() - started)
    return {
        "experts": experts,
        "nodes": len(list(graphs["decoder"].graph)),
        "lowered_nodes": len(list(lowered.graph)),
        "trace_seconds": median(traces),
        "lower_seconds": median(lowerings),
    }


@click.command(help=__doc__.splitlines()[0])
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(output: Path | None) -> None:
    measure(EXPERTS[0])  # imports
    rows = [measure(experts) for experts in track(EXPERTS, "tracing", console=console(stderr=True), transient=True)]
    heads = ("experts", "nodes", f"nodes for {TARGET}", "traced in", "lowered in")
    shown = [
        (
            str(r["experts"]),
            str(r["nodes"]),
            str(r["lowered_nodes"]),
            f"{r['trace_seconds']:.2f} s",
            f"{r['lower_seconds']:.3f} s",
        )
        for r in rows
    ]
    console().print(table(f"{SHAPE['layers']} layers", heads, shown))
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
