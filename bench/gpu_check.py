"""The proof on hardware: correctness and speed of the kernels, the plugin library and engines on this CUDA GPU.

    make gpu-check [PYTHON=python3] [ARGS="--only layers"]

Needs torch, triton and numpy, and no network; a C and a C++ compiler, or else leaves out Triton's launcher and the
plugin library. Writes bench/results/<gpu>.json, where parts of earlier runs on that GPU stay, and prints tables. A part
takes four minutes at most. Exit status 1: something failed; 2: no GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.gpu import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
# Each is a module of bench.gpu, the one that tells the most first. Nothing else uses the GPU while one is timed.
PARTS = {
    "checks": "every kernel variant against the spec in numpy",
    "attention": "times of paged attention against PyTorch's and the GPU's limits",
    "delta": "times of the gated delta rule against the GPU's limits",
    "layers": "times of MoE layers against grouped_mm and the GPU's limits",
    "vision": "times of attention among patches against scaled_dot_product_attention, flex_attention and the peak",
    "candidates": "times of choosing a row's likeliest tokens against topk, logsumexp and the bandwidth",
    "plugin": "the plugin library, called as TensorRT would",
    "engine": "the demo model through TensorRT, where one is installed",
    "host_experts": "times of experts that stay in the host's memory against the link to it",
    "cubins": "machine code compiled ahead of time against Triton's launcher",
}
TUNING = ("tune_vision", "tune")  # the shorter first
SECONDS = 200  # after which a part begins nothing more
GRACE_SECONDS = 40  # for what it has begun
TUNING_SECONDS = 3600
TOLD_SECONDS = 5  # between two looks at what a part has found
MOST_SHARDS = 16

Entries = list[dict[str, Any]]


def run_part(
    name: str, options: dict[str, int], folder: Path, seconds: float = SECONDS, grace: float = GRACE_SECONDS
) -> Entries:
    """The entries of a part, run in a process of its own; a crash becomes one more entry."""
    label = "-".join([name, *map(str, options.values())])
    output = folder / f"{label}.jsonl"
    given = (f"{key}={value}" for key, value in options.items())
    command = [sys.executable, "-m", "bench.gpu.part", name, str(output), str(seconds), *given]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=seconds + grace).returncode
        ended = f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        ended = f"took more than {seconds + grace:.0f} s"
    entries = written(output)
    if ended and not any(entry["kind"] == name and "error" in entry for entry in entries):
        entries.append({"kind": name, "part": name, "error": ended})
    return entries


def written(output: Path) -> Entries:
    """What a part has written so far. Its last line may be cut off."""
    entries = []
    for line in output.read_text().splitlines() if output.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def run_shards(name: str, sm: int, folder: Path, told: Callable[[Entries], None]) -> Entries:
    """A part's entries; told: called with those so far, now and then.

    The checks are compiled and run by several processes at once; nothing of theirs is timed.
    """
    print(f"{name}: {PARTS.get(name, 'alternative tiles')}", file=sys.stderr, flush=True)
    shards = min(len(os.sched_getaffinity(0)), MOST_SHARDS) if name == "checks" else 1
    options = [{"sm": sm} | ({"shard": i, "shards": shards} if shards > 1 else {}) for i in range(shards)]
    seconds = TUNING_SECONDS if name in TUNING else SECONDS
    with ThreadPoolExecutor(shards) as pool:
        running = [pool.submit(run_part, name, given, folder, seconds) for given in options]
        while wait(running, timeout=TOLD_SECONDS).not_done:
            told([entry for output in sorted(folder.glob(f"{name}-*.jsonl")) for entry in written(output)])
        return [entry for part in running for entry in part.result()]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    choices = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"repeatable. {choices}")
    parser.add_argument("--json", type=Path, help="where to write  [default: bench/results/<gpu>.json]")
    parser.add_argument("--tune", action="store_true", help="time alternatives of each tile, and nothing else")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = arguments(given)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        facts = run_part("facts", {}, folder, seconds=300)[0]
        if why := facts.get("missing") or facts.get("error"):
            print(f"error: {why}", file=sys.stderr)
            return 2
        name = report.file_name(facts["gpu"])
        path = options.json or RESULTS / (name.replace(".json", "-tiles.json") if options.tune else name)
        parts = list(TUNING) if options.tune else list(options.only or PARTS)
        earlier, entries = report.earlier(path, parts), list[dict[str, Any]]()

        def write(found: Entries) -> None:
            """As they come: the machine may be lent for a while only."""
            report.write(path, facts, [*earlier, *entries, *found])

        for part in parts:
            entries += run_shards(part, facts["sm"], folder, write)
            write([])
    print(f"{facts['gpu']}, SM{facts['sm']}\n\n{report.text_of(entries)}\n\nwritten to {path}")
    return 1 if report.failures(entries) else 0


if __name__ == "__main__":
    sys.exit(main())
