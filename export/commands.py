"""`moevlm export`, `moevlm build` and `moevlm parity`."""

from pathlib import Path

import click

from moevlm.runtime.cli import require
from moevlm.runtime.console import bytes_text, console, progress_bar

_LAYOUT = click.option(
    "--expert-layout",
    type=click.Choice(["auto", "out_in", "in_out"]),
    default="auto",
    show_default=True,
    help="How fused expert tensors lie on disk, where their shape does not tell.",
)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle to write.")
@_LAYOUT
def export(checkpoint: Path, output: Path, expert_layout: str) -> None:
    """Trace CHECKPOINT to the canonical ONNX graphs."""
    require("torch", "export")
    from moevlm.export.build import build as build_bundle

    with progress_bar() as progress:
        build_bundle(checkpoint, output, expert_layout=expert_layout, progress=progress)
    _report(output)
    console().print(f"next: moevlm build {output} --checkpoint {checkpoint} --target ort-cpu")


@click.command()
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to write, from a checkpoint.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Where BUNDLE came from: adds targets to it.")
@click.option("--target", "targets", multiple=True, help="reference or ort-cpu; repeatable.  [default: ort-cpu]")
@_LAYOUT
def build(
    source: Path, output: Path | None, checkpoint: Path | None, targets: tuple[str, ...], expert_layout: str
) -> None:
    """Trace a checkpoint and build one engine per target, or add targets to a bundle."""
    require("torch", "export")
    from moevlm.export.build import add_targets
    from moevlm.export.build import build as build_bundle

    if (output is None) == (checkpoint is None):
        raise click.UsageError("either CHECKPOINT -o BUNDLE, or BUNDLE --checkpoint CHECKPOINT")
    names = targets or ("ort-cpu",)
    with progress_bar() as progress:
        if checkpoint is None:
            build_bundle(source, output, names, expert_layout=expert_layout, progress=progress)
        else:
            add_targets(source, checkpoint, names, expert_layout=expert_layout, progress=progress)
    bundle, origin = (output, source) if checkpoint is None else (source, checkpoint)
    _report(bundle)
    console().print(f"next: moevlm parity {bundle} --checkpoint {origin}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="Where the bundle came from.")
@click.option("--target", "targets", multiple=True, help="Which engines; repeatable.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts and images.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
@_LAYOUT
def parity(
    bundle: Path, checkpoint: Path, targets: tuple[str, ...], seed: int, output: Path | None, expert_layout: str
) -> None:
    """Hold every step to the one before: Hugging Face, canonical PyTorch, and each engine. Status 1 on a mismatch."""
    require("transformers", "export")
    from moevlm.export.parity import check_parity
    from moevlm.export.parity_report import show, to_json

    with progress_bar() as progress:
        report = check_parity(bundle, checkpoint, targets, seed=seed, expert_layout=expert_layout, progress=progress)
    show(report)
    if output is not None:
        output.write_text(to_json(report) + "\n")
        console().print(f"written: {output}")
    if not report.passed:
        click.get_current_context().exit(1)
    console().print(f'next: moevlm run {bundle} --prompt "..." --image FILE')


def _report(bundle: Path) -> None:
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    console().print(f"bundle: {bundle} ({bytes_text(size)})")
