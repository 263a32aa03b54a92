"""How building and decoding grow with a model: Qwen3-VL-30B-A3B's geometry cut to a few layers, and more experts.

    python -m bench.scale_bench [--target cpu:int4] [--json bench/results/scale.json]

Two cuts give the cost of a layer; 48 layers are computed from it, not measured. Random checkpoints are written to
build/bench and removed again: the larger cut is 8 GB.
"""

import json
import shutil
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

from bench.export_bench import FOLDER, measure
from bench.random_checkpoint import config, write
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.cli.console import console, table
from moevlm.runtime.core.printable import bytes_text
from moevlm.runtime.loading import load_engine
from moevlm.runtime.perf.machine import measure_machine
from moevlm.runtime.request.prompt import Prompt

QWEN = {"hidden": 2048, "experts": 128, "top_k": 8, "width": 768, "vocabulary": 151936}  # Qwen3-VL-30B-A3B
LAYERS = 48
CUTS = (3, 6)  # three are as few as its deepstack takes
BANKS = (16, 64, 128)
PAST, TOKENS, ROUNDS = 256, 32, 5
BUILD = """
import sys
from moevlm.export.build import build
build(sys.argv[1], sys.argv[2], [sys.argv[3]])
"""


def scale(name: str, target: str, layers: int, **shape: int) -> dict[str, object]:
    """Write, build and run one checkpoint, then remove it."""
    checkpoint, bundle = FOLDER / name, FOLDER / f"{name}.moevlm"
    click.echo(f"{name}: writing", err=True)
    size = write(checkpoint, config(layers=layers, **shape))
    click.echo(f"{name}: building", err=True)
    seconds, peak = measure(BUILD, str(checkpoint), str(bundle), target)
    shutil.rmtree(checkpoint)
    click.echo(f"{name}: decoding", err=True)
    opened = Bundle.open(bundle)
    result = {
        "name": name,
        "layers": layers,
        **shape,
        "parameters": size // 2,
        "build_seconds": seconds,
        "build_peak_bytes": peak,
        "engine_bytes": sum(opened.manifest.files[path].size for path in opened.engine_files(target)),
        "decode_seconds": decode_seconds(opened, target),
    }
    shutil.rmtree(bundle)
    return result


def decode_seconds(bundle: Bundle, target: str) -> float:
    """Of one token at a context of PAST, the median of ROUNDS times TOKENS different ones."""
    model, engine = bundle.manifest.model, load_engine(bundle, target)
    rng, times = np.random.default_rng(0), []
    for round_number in range(ROUNDS + 1):
        ids = rng.integers(0, model.image_token_id - 8, PAST + TOKENS)
        prompts = [Prompt.from_ids(ids[:PAST], [], model)]
        batch = Batch(engine, model, prompts, None, BatchLimits.of(prompts, engine.limits, TOKENS))
        batch.prefill()
        for token in ids[PAST:]:
            started = perf_counter()
            batch.decode([token]).argmax()
            times.append(perf_counter() - started)
        if round_number == 0:
            times.clear()
    return median(times)


def extrapolated(small: dict[str, object], large: dict[str, object], layers: int) -> dict[str, float]:
    """A straight line through two cuts, at `layers`."""
    step = (layers - float(str(small["layers"]))) / (float(str(large["layers"])) - float(str(small["layers"])))
    names = ("parameters", "build_seconds", "engine_bytes", "decode_seconds")
    values = {name: (float(str(small[name])), float(str(large[name]))) for name in names}
    return {name: a + (b - a) * step for name, (a, b) in values.items()}


@click.command()
@click.option("--target", default="cpu:int4", show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(target: str, output: Path | None) -> None:
    """Measure cuts of a large model, and banks of experts."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = measure_machine()
    cuts = [scale(f"30B-{layers}", target, layers, **QWEN) for layers in CUTS]
    banks = [scale(f"bank-{n}", target, 3, **QWEN | {"experts": n, "vocabulary": 32000}) for n in BANKS]
    whole = extrapolated(*cuts, LAYERS)
    rows = [
        (
            str(r["name"]),
            f"{float(str(r['parameters'])) / 1e9:.2f} B",
            f"{float(str(r['build_seconds'])):.0f} s",
            bytes_text(int(str(r["build_peak_bytes"]))),
            bytes_text(int(str(r["engine_bytes"]))),
            f"{float(str(r['decode_seconds'])) * 1e3:.2f} ms",
            f"{1 / float(str(r['decode_seconds'])):.1f}",
        )
        for r in [*cuts, *banks]
    ]
    heads = ("checkpoint", "parameters", "build", "peak memory", "engine", "a token", "tok/s")
    console().print(table(f"{target}, {machine.threads} cores, {PAST} past", heads, rows))
    text = (
        f"extrapolated to {LAYERS} layers: {whole['parameters'] / 1e9:.1f} B parameters, "
        f"built in {whole['build_seconds'] / 60:.0f} minutes, engine {bytes_text(int(whole['engine_bytes']))}, "
        f"{whole['decode_seconds'] * 1e3:.0f} ms a token ({1 / whole['decode_seconds']:.1f} tok/s)"
    )
    console().print(f"\n{text}\nmemory read at {machine.read / 1e9:.1f} GB/s")
    if output is not None:
        report = {"target": target, "read": machine.read, "cuts": cuts, "banks": banks, "extrapolated": whole}
        output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
