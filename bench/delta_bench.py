"""The gated delta rule of Qwen3.5-35B-A3B on a CPU, against llama.cpp, ONNX Runtime and transformers, in one run.

    python -m bench.delta_bench [--repeats 9] [--threads 2] [--json bench/results/delta.json]

The systems take turns. Decoding goes through 30 layers, whose states no cache holds; a prompt through one. Measured is
processor time, divided by the threads, which wait awake: so what else the machine does counts little.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

import click
import msgspec
import numpy as np

from bench import machine
from bench.delta_rules import RULES, Operator, Work
from bench.peers.client import PeerError
from bench.peers.ggml_delta import LlamaCpp
from bench.peers.llama_cpp_setup import set_up
from moevlm.plugins.ops.spec import GatedDeltaSpec
from moevlm.runtime.cli.console import publish, table
from moevlm.runtime.perf.machine import Machine, measure_machine
from moevlm.runtime.perf.process_limits import cores

SPEC = GatedDeltaSpec(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4)
WORKS = {
    "decode of 1": Work(SPEC, sequences=1, tokens=1, layers=30),
    "decode of 8": Work(SPEC, sequences=8, tokens=1, layers=30),
    "prompt of 512": Work(SPEC, sequences=1, tokens=512, layers=1),
    "prompt of 2048": Work(SPEC, sequences=1, tokens=2048, layers=1),
}
TOLERANCE = 1e-4  # of the largest result, between two systems


def measure(work: Work, threads: int, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Processor seconds of a layer and thread, by system. Raises ClickException if they do not compute the same."""
    rules = [rule(work, threads) for rule in (*RULES, LlamaCpp)]
    for rule in rules:
        rule.run()
        far = np.abs(rule.y() - rules[0].y()).max() / np.abs(rules[0].y()).max()
        if not far < TOLERANCE:
            raise click.ClickException(f"{rule.name} differs from {rules[0].name} by {far:.1e} of the largest result")
    seconds: dict[str, list[float]] = {rule.name: [] for rule in rules}
    for turn in range(repeats):
        for rule in rules[turn % len(rules) :] + rules[: turn % len(rules)]:
            started = clock()
            rule.run()
            seconds[rule.name].append((clock() - started) / work.layers)
    return seconds


def rates(work: Work, seconds: float, limits: Machine) -> dict[str, float]:
    """What a layer does in a second, and as a part of what the machine can: bytes of states in decoding, both ways;
    multiplications and additions with states in a prompt.
    """
    if work.tokens == 1:
        moved = 2 * 4 * work.sequences * SPEC.value_heads * SPEC.key_dim * SPEC.value_dim / seconds
        return {"GB/s": moved / 1e9, "of the limit": moved / limits.read}
    done = work.tokens * SPEC.state_macs / seconds
    return {"GFLOP/s": 2 * done / 1e9, "of the limit": done / limits.float32}


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=9, show_default=True, help="After a first round.")
@click.option("--threads", type=click.IntRange(1), default=cores(), show_default="all cores")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(repeats: int, threads: int, output: Path | None) -> None:
    """Measure the gated delta rule on this CPU."""
    try:
        set_up()
    except PeerError as error:
        raise click.ClickException(str(error)) from None

    def clock() -> float:
        return process_time() / threads

    measured, limits = {}, []
    for name, work in WORKS.items():
        limits.append(measure_machine(threads, clock))
        measured[name] = measure(work, threads, repeats, clock)
    best = Machine(threads, *(max(getattr(n, field) for n in limits) for field in ("read", "float32", "int8")))
    entries, rows = [], []
    for name, systems in measured.items():
        first = median(next(iter(systems.values())))
        for system, seconds in systems.items():
            rate = rates(WORKS[name], median(seconds), best)
            entries.append({"work": name, "system": system, "seconds": seconds, "median": median(seconds)} | rate)
            (unit, value), (_, part) = rate.items()
            spread = f"{min(seconds) * 1e3:.3g} to {max(seconds) * 1e3:.3g}"
            own, ratio = system == Operator.name, f"{median(seconds) / first:.2f} x"
            measures = (f"{median(seconds) * 1e3:.3g} ms", spread, f"{value:.3g} {unit}", f"{part:.0%}")
            rows.append((name if own else "", system, *measures, "" if own else ratio))
    report = {
        "machine": machine.facts() | msgspec.structs.asdict(best),
        "repeats": repeats,
        "results": entries,
    }
    heads = ("work", "system", "a layer", "range, ms", "rate", "of the limit", "first is")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    publish(table(f"medians of {repeats}, systems in turn", heads, rows), json.dumps(report, indent=2), output)


if __name__ == "__main__":
    main()
