"""`moevlm bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moevlm.runtime.cli.command_line import (
    CACHE_MEMORY,
    EXPERTS_IN,
    SPINNING,
    THREADS,
    complete_target,
    require,
    require_apart,
)
from moevlm.runtime.cli.option_types import OutputFile, Size, WholeNumber
from moevlm.runtime.core.errors import EngineError, RequestError, refusal
from moevlm.runtime.core.experts_in import DEVICE

if TYPE_CHECKING:
    from moevlm.runtime.perf.latency_report import BenchReport

_SIZE = "Side of a square image, in pixels; 0 for none.  [default: 448; 0 for a model of text alone]"
_USUAL_SIZE = 448


@click.group()
def bench() -> None:
    """Measure a bundle on this machine."""


@bench.command(short_help="Time one request, stage by stage.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt-tokens",
    metavar="N",
    type=WholeNumber(1),
    default=256,
    show_default=True,
    help="Tokens of the random text; those of the image come on top.",
)
@click.option(
    "--new-tokens",
    metavar="N",
    type=WholeNumber(2),
    default=64,
    show_default=True,
    help="Length of the answer, in tokens.",
)
@click.option("--image-size", metavar="N", type=WholeNumber(0, 4096), help=_SIZE)
@click.option(
    "--target",
    "targets",
    multiple=True,
    shell_complete=complete_target,
    help="Engine to measure; repeatable.  [default: the one that run takes]",
)
@click.option(
    "--repeats",
    metavar="N",
    type=WholeNumber(1, 1000),
    default=5,
    show_default=True,
    help="Number of timed requests; one before them is not timed.",
)
@click.option("--threads", metavar="N", type=WholeNumber(1), help=THREADS)
@click.option("--spinning/--no-spinning", default=True, show_default=True, help=SPINNING)
@click.option("--cache-memory", metavar="SIZE", type=Size(), help=CACHE_MEMORY)
@click.option("--experts-in", metavar="PLACE", default=DEVICE, help=EXPERTS_IN)
@click.option("--json", "output", type=OutputFile(), help="Write the results to this file, too; - prints only them.")
@click.option("--plot", type=OutputFile(), help="Draw a roofline of the stages into this PNG file.")
def latency(
    bundle: Path,
    prompt_tokens: int,
    new_tokens: int,
    image_size: int | None,
    targets: tuple[str, ...],
    repeats: int,
    threads: int | None,
    spinning: bool,
    cache_memory: int | None,
    experts_in: str,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Time one request, stage by stage: medians of several, beside the least that this machine would need."""
    from moevlm.runtime.backends.registry import backend_of
    from moevlm.runtime.backends.selection import select
    from moevlm.runtime.bundle.reader import Bundle
    from moevlm.runtime.cli.background import Background
    from moevlm.runtime.cli.console import console, progress_bar, publish
    from moevlm.runtime.core.reports import to_json
    from moevlm.runtime.load_options import LoadOptions
    from moevlm.runtime.loading import load_images, load_runtime
    from moevlm.runtime.perf.latency import measure, random_prompt
    from moevlm.runtime.perf.latency_report import BenchReport
    from moevlm.runtime.perf.machine import measure_gpu, measure_machine

    require_apart([output, plot], [bundle])
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise click.UsageError(refusal("--plot", str(plot), "a PNG file: a name that ends in .png"))
        require("matplotlib", "plot")
    opened = Bundle.open(bundle)
    model, images = opened.manifest.model, load_images(opened)
    engines = [select(opened, target) for target in targets or (None,)]
    options = LoadOptions(threads, spinning, cache_memory=cache_memory, experts_in=experts_in)
    context = min(backend_of(engine).limits(model, engine).max_context for _, engine in engines)
    _require_context(prompt_tokens, new_tokens, context)  # before they are made
    if image_size is None:
        image_size = _USUAL_SIZE if model.vision else 0
    prompt = random_prompt(model, images, prompt_tokens, image_size)
    _require_context(len(prompt.ids), new_tokens, context)
    on_gpu = [name for name, engine in engines if engine.sms]
    notes: list[str] = []
    machine = gpu = None
    with progress_bar() as progress:
        if len(on_gpu) < len(engines):
            progress("measuring this machine", 0, 0)
            try:
                machine = measure_machine(threads)
            except EngineError as error:
                if plot is not None:
                    raise
                notes.append(f"note: no limits beside the times: {error}")
        if on_gpu and experts_in != DEVICE:
            why = "the link to the host's memory, over which it reads experts, is not measured"
            notes.append(f"note: no limits beside the times of {', '.join(on_gpu)}: {why}")
        elif on_gpu:
            progress("measuring this GPU", 0, 0)
            try:
                gpu = measure_gpu()
            except EngineError as error:
                notes.append(f"note: no limits beside the times of {', '.join(on_gpu)}: {error}")
        with Background() as background:
            results = [
                background.call(
                    partial(
                        measure,
                        name,
                        engine,
                        partial(load_runtime, bundle, name, options),
                        prompt,
                        new_tokens,
                        repeats,
                        gpu if name in on_gpu else machine,
                        None if name in on_gpu else threads,
                        partial(progress, f"measuring {name}"),
                    )
                )
                for name, engine in engines
            ]
    refused = [result for result in results if result.graphs and result.graphs.startswith("refused")]
    notes += [f"note: {result.target} queues every step anew: recording was {result.graphs}" for result in refused]
    for note in notes:
        console(stderr=True).print(note)
    report = BenchReport(
        bundle=str(bundle),
        prompt_tokens=len(prompt.ids),
        image_tokens=prompt.image_tokens,
        image_size=image_size,
        new_tokens=new_tokens,
        repeats=repeats,
        results=results,
        machine=machine,
        gpu=gpu,
    )
    if plot is not None:
        from moevlm.runtime.perf.roofline import plot as plot_roofline

        plot_roofline(report, plot)
    publish(_table(report), to_json(report), output)


def _require_context(prompt: int, new: int, context: int) -> None:
    if prompt + new > context:
        raise RequestError(f"{prompt} prompt tokens and {new} new ones are more than the context of {context}")


def _table(report: BenchReport) -> str:
    from moevlm.runtime.cli.console import table

    rows = [
        (
            r.target,
            f"{r.vision.median * 1e3:.2f}" if r.vision else "-",
            f"{r.prefill.median * 1e3:.2f}",
            f"{r.prefill_tokens_per_second:.0f}",
            f"{r.first_token.median * 1e3:.2f}",
            f"{r.decode_token.median * 1e3:.2f}",
            f"{r.decode_tokens_per_second:.0f}",
            f"{r.load_seconds:.2f} s",
        )
        for r in report.results
    ]
    prompt = f"{report.prompt_tokens} prompt tokens, {report.image_tokens} of them image"
    title = f"{prompt}; {report.new_tokens} new; ms, medians of {report.repeats}"
    text = table(title, ("target", "image", "prompt", "prompt tok/s", "first", "token", "decode tok/s", "load"), rows)
    return text + _limits_table(report)


def _limits_table(report: BenchReport) -> str:
    """How near each stage came to what this machine can do."""
    from moevlm.runtime.cli.console import table

    rows = []
    for result in report.results:
        stages = {
            "image": (result.vision_limit, result.vision),
            "prompt": (result.prefill_limit, result.prefill),
            "token": (result.decode_limit, result.decode_token),
        }
        for stage, (found, seconds) in stages.items():
            if found is not None and seconds is not None:
                rows.append(
                    (
                        f"{result.target} {stage}",
                        f"{found.bytes / 1e6:.1f}",
                        f"{found.flops / 1e9:.2f}",
                        f"{found.bytes / seconds.median / 1e9:.1f}",
                        f"{found.flops / seconds.median / 1e9:.0f}",
                        f"{found.seconds * 1e3:.2f}",
                        f"{found.fraction:.0%}",
                        found.bound,
                    )
                )
    limits = []
    if (machine := report.machine) is not None:
        limits += [
            f"this machine, {machine.threads} threads: {machine.read / 1e9:.1f} GB/s from memory",
            f"{2 * machine.int8 / 1e9:.0f} GOP/s in bytes, {2 * machine.float32 / 1e9:.0f} GFLOP/s in float32",
        ]
    if (gpu := report.gpu) is not None:
        limits.append(f"{gpu.name}: {gpu.copied / 1e9:.1f} GB/s copying its memory, matrix peak not measured")
    title = "; ".join(limits)
    heads = ("stage", "MB", "GFLOP", "GB/s", "GFLOP/s", "least ms", "of limit", "bound by")
    return "\n\n" + table(title, heads, rows) if rows else ""
