"""Our CPU engines against llama.cpp, OpenVINO and transformers, on one random checkpoint, in one run.

    python -m bench.cpu_bench [--repeats 5] [--threads 2] [--only llama] [--json bench/results/cpu.json]

The systems take turns, so that whatever else the machine does meets all of them alike. Each is a process that is idle
between its turns; the first round does not count. Checkpoints, bundles and peers lie under build/.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median

import click
import msgspec

from bench import machine
from bench.export_bench import ONE_BILLION
from bench.peers.client import Peer, PeerError
from bench.peers.protocol import Reply, Request
from bench.random_checkpoint import config, write
from bench.systems import METRICS, SYSTEMS, Metric, System, prepare
from moevlm.runtime.cli.console import console, progress_bar, publish, table
from moevlm.runtime.core.errors import MoevlmError
from moevlm.runtime.core.printable import bytes_text
from moevlm.runtime.perf.machine import measure_machine
from moevlm.runtime.perf.process_limits import cores

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/bench"

Replies = dict[tuple[str, Request], list[Reply]]  # by the system's name and what it was asked, warm-up left out


def measure(
    peers: Sequence[Peer], metrics: Iterable[Metric], repeats: int, progress: Callable[[str, int, int], None]
) -> Replies:
    """Ask every system for its metrics, in turns that start with another one each round."""
    asked: dict[Request, set[str]] = {}
    for metric in metrics:
        asked.setdefault(metric.request, set()).update(metric.systems)
    replies: Replies = {}
    for request, names in asked.items():
        chosen = [peer for peer in peers if peer.name in names]
        title = f"{request.metric} of {request.tokens}, {request.past} past, batch {request.batch}"
        for round_number in range(repeats + 1):
            progress(title, round_number, repeats + 1)
            start = round_number % max(len(chosen), 1)
            for peer in chosen[start:] + chosen[:start]:
                reply = peer.ask(request)
                if round_number:
                    replies.setdefault((peer.name, request), []).append(reply)
    return replies


def results(replies: Replies, metrics: Iterable[Metric]) -> list[dict[str, object]]:
    """One entry per metric and system that answered: median, minimum, maximum and all values, in the metric's unit."""
    found: list[dict[str, object]] = []
    for metric in metrics:
        for name in metric.systems:
            measured = replies.get((name, metric.request), [])
            if not measured:
                continue
            values = [metric.value(reply.seconds, reply.tokens) for reply in measured]
            found.append(
                {
                    "metric": metric.name,
                    "unit": metric.unit,
                    "request": asdict(metric.request),
                    "system": name,
                    "median": median(values),
                    "minimum": min(values),
                    "maximum": max(values),
                    "values": values,
                    "chosen": measured[-1].chosen,
                }
            )
    return found


def table_of(entries: Sequence[dict], metrics: Iterable[Metric], repeats: int) -> str:
    """A row per metric and system; the last column says how many times as fast the first system of the metric is."""
    rows = []
    for metric in metrics:
        mine = [entry for entry in entries if entry["metric"] == metric.name]
        for entry in mine:
            first, this = mine[0]["median"], entry["median"]
            ratio = this / first if metric.unit == "s" else first / this
            spread = f"{entry['minimum']:.4g} to {entry['maximum']:.4g}"
            label = metric.name if entry is mine[0] else ""
            own = entry is mine[0]
            rows.append((label, entry["system"], f"{this:.4g} {metric.unit}", spread, "" if own else f"{ratio:.2f} x"))
    return table(f"medians of {repeats}, systems in turn", ("metric", "system", "median", "range", "first is"), rows)


def _checkpoint() -> Path:
    path = FOLDER / "1B"
    if not (path / "model.safetensors.index.json").exists():
        click.echo(f"writing a random checkpoint to {path}", err=True)
        write(path, config(**ONE_BILLION))
    return path


def _start(system: System, checkpoint: Path, threads: int) -> Peer:
    log = ROOT / "build/peers/logs" / f"{system.name.replace(' ', '-').replace(':', '-')}.log"
    return Peer(system.name, system.command(checkpoint, threads), ROOT, log)


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="After a first round.")
@click.option("--threads", type=click.IntRange(1), default=cores(), show_default="all cores")
@click.option("--only", multiple=True, help="Part of a system's name; repeatable.  [default: all systems]")
@click.option("--metric", "wanted", multiple=True, help="Part of a metric's name; repeatable.  [default: all]")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Instead of the generated one.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    repeats: int,
    threads: int,
    only: tuple[str, ...],
    wanted: tuple[str, ...],
    checkpoint: Path | None,
    output: Path | None,
) -> None:
    """Measure the CPU engines and their peers."""
    systems = [system for system in SYSTEMS if not only or any(part in system.name for part in only)]
    metrics = [metric for metric in METRICS if not wanted or any(part in metric.name for part in wanted)]
    path = checkpoint.absolute() if checkpoint else _checkpoint()
    try:
        click.echo("preparing systems (the first time: minutes)", err=True)
        prepare(path, systems)
        limits = measure_machine(threads)
        with ExitStack() as stack, progress_bar() as progress:
            peers = []
            for system in systems:
                progress(f"loading {system.name}", 0, 0)
                peers.append(stack.enter_context(_start(system, path, threads)))
            entries = results(measure(peers, metrics, repeats, progress), metrics)
            facts = {peer.name: {"resident_bytes": peer.resident_bytes()} | peer.versions for peer in peers}
    except (PeerError, MoevlmError) as error:
        raise click.ClickException(str(error)) from None
    report = {
        "machine": machine.facts() | msgspec.structs.asdict(limits),
        "checkpoint": ONE_BILLION if checkpoint is None else str(checkpoint),
        "repeats": repeats,
        "systems": facts,
        "results": entries,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    publish(table_of(entries, metrics, repeats), json.dumps(report, indent=2), output)
    memory = ", ".join(f"{name} {bytes_text(int(fact['resident_bytes']))}" for name, fact in facts.items())
    console(stderr=True).print(f"memory read at {limits.read / 1e9:.1f} GB/s; resident: {memory}")


if __name__ == "__main__":
    main()
