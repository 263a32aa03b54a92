"""The whole engine of the demo without a GPU: every kernel in Triton's interpreter, eight requests at once.

    python -m tests.simulate [--dtype fp16] [--experts int4] [--kv-cache int8] [--new-tokens 8]

Greedy answers are held to those of the CPU's engine in float32 or, where an option rounds weights or caches, to those
of the same engine with numpy in the place of kernels. Prints each, and ends with 1 where tokens differ by more than a
near tie explains. About a minute on an idle core.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from PIL import Image

from bench.plugin_harness import compile_harness, compile_library
from moevlm.export.build import build
from moevlm.runtime.engine.answer import Completion
from tests.plugins.gpu.interpreter import interpreter
from tests.plugins.tensorrt.fake_cuda import compile_driver
from tests.support.simulator.bundle import simulated_build
from tests.support.simulator.libraries import Libraries
from tests.support.simulator.run import Report, answer, cpu_answers, interpret
from tests.support.simulator.specified import SpecifiedKernels

DEMO = Path(__file__).parents[1] / "demo"
QUESTIONS = (
    ("Read the digits.", "read-003"),
    ("Add 5 + 9 + 7.", ""),
    ("Summarise: pear, saw, plum, apple.", ""),
    ("Where is the 7?", "where-004"),
    ("Translate to Chinese: one thousand and five", ""),
    ("Which topic is this? They say the ferry will be late.", ""),
    ("Read the digits.", "digit-000"),
    ("Add 1 + 1.", ""),
)
# Between the logarithms of the likeliest tokens' probabilities, where another token is no fault.
NEAR_TIE = {"fp32": 1e-3, "fp16": 0.05}


@click.command(help=__doc__)
@click.option("--dtype", type=click.Choice(list(NEAR_TIE)), default="fp32", help="Of activations.")
@click.option("--experts", default="same")
@click.option("--kv-cache", default="same")
@click.option("--new-tokens", default=5, help="Of each answer.")
def main(dtype: str, experts: str, kv_cache: str, new_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        driver = compile_driver(folder / "libcuda.so.1")
        libraries = Libraries(
            compile_library(folder / "plugins.so", driver), compile_harness(folder / "harness.so"), driver
        )
        graphs, gpu = folder / "graphs", folder / "gpu"
        graphs.mkdir()
        gpu.mkdir()
        options: dict[str, Any] = {"experts": experts, "kv_cache": kv_cache, "max_sequences": 8, "chunk_tokens": 128}
        with simulated_build(graphs, exact=dtype == "fp32") as ops:
            bundle = build(
                DEMO / "checkpoint", folder / "demo.moevlm", ["ort-cpu", "rtx:sm89"], dtype="fp16", **options
            )
        (target,) = (name for name in bundle.manifest.engines if name.startswith("rtx"))
        started = time.perf_counter()
        with interpreter() as process:
            given = bundle.directory, target, gpu, libraries
            found: Report = process.call(interpret, *given, _requests(), new_tokens)
        click.echo(f"{target}: {time.perf_counter() - started:.0f} s, steps of (tokens, sequences) {found.steps}")
        click.echo(f"{found.replays} recorded steps replayed, kernels that ran: {found.launches}")
        if experts == kv_cache == "same":
            expected = cpu_answers(bundle.directory, "ort-cpu", _requests(), new_tokens)
        else:
            kernels = SpecifiedKernels(ops)
            expected = answer(*given, kernels, kernels.launches, _requests(), new_tokens).answers
    faults = sum(not _agree(*pair, NEAR_TIE[dtype]) for pair in zip(found.answers, expected, strict=True))
    if faults or found.held:
        raise SystemExit(f"{faults} answers differ, left over: {found.held}")


def _requests() -> list[list[dict[str, Any]]]:
    found = []
    for text, image in QUESTIONS:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if image:
            content.insert(0, {"type": "image", "image": Image.open(DEMO / "eval" / "images" / f"{image}.png")})
        found.append([{"role": "user", "content": content}])
    return found


def _agree(got: Completion, want: Completion, near_tie: float) -> bool:
    """Whether all tokens are the same, or those before the first that differs, which is one of a near tie."""
    click.echo(f"  {got.text!r} (expected {want.text!r})")
    for one, other in zip(got.sampled, want.sampled, strict=True):
        if one.token_id != other.token_id:
            likely = dict(other.top)
            return one.token_id in likely and max(likely.values()) - likely[one.token_id] < near_tie
    return True


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
