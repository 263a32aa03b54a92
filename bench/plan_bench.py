"""What building TensorRT plans costs; with more experts only the file that they are copied to grows.

    python -m bench.plan_bench [--target rtx:sm89] [--json FILE]

A checkpoint of 1.08 B parameters with 12 layers, and 3 layers of Qwen3-VL-30B-A3B's geometry with more and more
experts. Random checkpoints lie under build/bench; all but the first are removed again.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import click

from bench.export_bench import FOLDER, ONE_BILLION
from bench.random_checkpoint import config, write
from bench.scale_bench import BANKS, QWEN
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.cli.console import console, table
from moevlm.runtime.core.printable import bytes_text

SECONDS_BETWEEN_SAMPLES = 0.05
BUILD = """
import sys, time
from moevlm.export.build import build
labels = [""]
def progress(label, done, total):
    if label != labels[-1]:
        labels.append(label)
        print(time.time(), label, flush=True)
build(sys.argv[1], sys.argv[2], [sys.argv[3]], progress=progress)
print(time.time(), "end")
"""
STEPS = {"compiling": "kernels_seconds", "writing": "experts_seconds", "building": "plans_seconds"}  # by first words


def resident(session: int) -> int:
    """Bytes that all processes of a session have in memory; pages that they share are counted once for each."""
    total, page = 0, os.sysconf("SC_PAGE_SIZE")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        if int(fields[3]) == session:
            total += int(fields[21]) * page
    return total


def processor_seconds() -> float:
    """Of all processes that this one has waited for, and theirs: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(checkpoint: Path, bundle: Path, target: str) -> dict[str, float]:
    """Seconds in all and by step, those of processors in all, and the most bytes in memory.

    A build runs several processes.
    """
    started, most, spent = time.time(), 0, processor_seconds()
    command = [sys.executable, "-c", BUILD, str(checkpoint), str(bundle), target]
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=told, stderr=log, start_new_session=True)
        try:
            while process.poll() is None:
                most = max(most, resident(process.pid))
                time.sleep(SECONDS_BETWEEN_SAMPLES)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for file in (told, log):
            file.seek(0)
        lines, errors = told.read().splitlines(), log.read().strip().splitlines()
    if process.returncode:
        raise click.ClickException(f"the build ended with {process.returncode}: {errors[-1] if errors else 'no word'}")
    marks = [(float(at), label) for at, _, label in (line.partition(" ") for line in lines)]
    seconds = dict.fromkeys(STEPS.values(), 0.0)
    for (at, label), (after, _) in pairwise(marks):
        if step := STEPS.get(label.partition(" ")[0]):
            seconds[step] += after - at
    whole = {"build_seconds": marks[-1][0] - started, "build_processor_seconds": processor_seconds() - spent}
    return whole | {"build_peak_bytes": most, **seconds}


def cost(name: str, target: str, shape: dict[str, int], keep: bool) -> dict[str, object]:
    """Write a checkpoint unless it is there, and build it. keep: the checkpoint."""
    checkpoint, bundle = FOLDER / name, FOLDER / f"{name}.plans.moevlm"
    if not (checkpoint / "model.safetensors.index.json").exists():
        click.echo(f"{name}: writing", err=True)
        write(checkpoint, config(**shape))
    click.echo(f"{name}: building", err=True)
    try:
        result = {"name": name, **shape, **measure(checkpoint, bundle, target)}
        facts = Bundle.open(bundle).manifest
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
        if not keep:
            shutil.rmtree(checkpoint)
    (engine,) = facts.engines.values()
    assert engine.tensorrt is not None
    paths = {"decoder": engine.decoder, "vision": engine.vision, "experts": engine.tensorrt.experts}
    return result | {f"{what}_bytes": facts.files[path].size for what, path in paths.items()}


@click.command()
@click.option("--target", default="rtx:sm89", show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(target: str, output: Path | None) -> None:
    """Measure builds of plans."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    banks = {f"bank-{n}": QWEN | {"layers": 3, "experts": n, "vocabulary": 32000} for n in BANKS}
    results = [cost("1B", target, ONE_BILLION, keep=True)]
    results += [cost(name, target, shape, keep=False) for name, shape in banks.items()]
    seconds = ("build_seconds", "build_processor_seconds", *STEPS.values())
    sizes = ("build_peak_bytes", "decoder_bytes", "vision_bytes", "experts_bytes")
    rows = [
        (
            str(r["name"]),
            *(f"{float(str(r[name])):.1f} s" for name in seconds),
            *(bytes_text(int(str(r[name]))) for name in sizes),
        )
        for r in results
    ]
    steps = ("compile kernels", "write experts", "build plans")
    heads = ("checkpoint", "all", "processors", *steps, "peak memory", "decoder", "vision", "experts")
    console().print(table(f"{target}, bf16", heads, rows))
    if output is not None:
        output.write_text(json.dumps({"target": target, "builds": results}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
