"""`moevlm bench`."""

from pathlib import Path

import click

from moevlm.runtime.errors import RequestError


@click.group()
def bench() -> None:
    """Measure a bundle on this machine."""


@bench.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=click.IntRange(1), default=256, show_default=True, help="Text tokens.")
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--image-size", type=click.IntRange(0), default=448, show_default=True, help="Pixels; 0: none.")
@click.option("--target", "targets", multiple=True, help="Which engines; repeatable.  [default: one]")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="After one that does not count.")
@click.option("--threads", type=int, help="Cores for one operator.  [default: all]")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def latency(
    bundle: Path,
    prompt_tokens: int,
    new_tokens: int,
    image_size: int,
    targets: tuple[str, ...],
    repeats: int,
    threads: int | None,
    output: Path | None,
) -> None:
    """Time one request, stage by stage: medians of several."""
    from moevlm.runtime.bundle import Bundle
    from moevlm.runtime.console import console, progress_bar, table
    from moevlm.runtime.latency import measure, random_prompt
    from moevlm.runtime.loading import load_engine, load_images
    from moevlm.runtime.reports import BenchReport, to_json

    opened = Bundle.open(bundle)
    model, images = opened.manifest.model, load_images(opened)
    names = [opened.engine(target)[0] for target in targets or (None,)]
    prompt = random_prompt(model, images, prompt_tokens, image_size)
    if len(prompt.ids) + new_tokens > model.context:
        raise RequestError(
            f"{len(prompt.ids)} prompt tokens and {new_tokens} new ones are more than the context of {model.context}"
        )
    with progress_bar() as progress:
        results = [
            measure(
                name,
                lambda name=name: load_engine(opened, name, threads),
                model,
                images,
                prompt,
                new_tokens,
                repeats,
                threads,
                lambda done, total, name=name: progress(f"measuring {name}", done, total),
            )
            for name in names
        ]
    report = BenchReport(
        bundle=str(bundle),
        prompt_tokens=len(prompt.ids),
        image_tokens=prompt.image_tokens,
        image_size=image_size,
        new_tokens=new_tokens,
        repeats=repeats,
        results=results,
    )

    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1e3:.2f} ms"

    rows = [
        (
            r.target,
            milliseconds(r.vision.median) if r.vision else "-",
            f"{milliseconds(r.prefill.median)} ({r.prefill_tokens_per_second:.0f} tok/s)",
            milliseconds(r.first_token.median),
            f"{milliseconds(r.decode_token.median)} ({r.decode_tokens_per_second:.0f} tok/s)",
            f"{r.load_seconds:.2f} s",
        )
        for r in results
    ]
    prompt_text = f"{report.prompt_tokens} prompt tokens, {report.image_tokens} of them image"
    title = f"{prompt_text}; {new_tokens} new; median of {repeats}"
    console().print(table(title, ("target", "image", "prompt", "first token", "each token", "load"), rows))
    if output is not None:
        output.write_text(to_json(report) + "\n")
        console().print(f"written: {output}")
