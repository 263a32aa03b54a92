"""Parity of every family with transformers, for the table of families: rewrites export/families/measured.json.

    python -m tests.measure_families [MODEL_TYPE ...]

Builds each tiny model for `reference`, `ort-cpu`, `cpu:int8` and `cpu:int4`, and one of each family for `rtx:sm89`;
ends with 1 if a check failed. Some minutes.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

import moevlm.export.families
from moevlm.export.build import add_targets, build
from moevlm.export.parity.run import check_parity
from tests.support.families import TINY
from tests.support.tiny import TinyCheckpoint

FILE = Path(moevlm.export.families.__file__).with_name("measured.json")
EXACT = ("canonical PyTorch", "reference", "ort-cpu")  # in float32, held to transformers itself
CPU = ("reference", "ort-cpu", "cpu:int8", "cpu:int4")
GPU = "rtx:sm89"


def measure(model_type: str) -> dict[str, Any]:
    """configurations: that passed. difference: the largest relative error of a float32 step. targets: that hold."""
    difference, names = 0.0, TINY[model_type].configurations
    targets = [*CPU]
    for number, options in enumerate(names.values()):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = TinyCheckpoint(model_type, **options).save(Path(folder) / "checkpoint")
            bundle = build(checkpoint, Path(folder) / "bundle", CPU).directory
            report = check_parity(bundle, checkpoint, quick=True)
            failed = [
                f"{check.step}: {check.quantity} = {check.value:.2g}" for check in report.checks if not check.passed
            ]
            if failed:
                raise click.ClickException(f"{model_type}, {list(names)[number]}: {failed[0]}")
            exact = [check.value for check in report.checks if check.step in EXACT and "logits" in check.quantity]
            difference = max(difference, *exact)
            if number == 0:
                targets.append(next(iter(add_targets(bundle, checkpoint, [GPU]).manifest.engines.keys() - {*CPU})))
    return {"configurations": len(names), "difference": float(f"{difference:.1e}"), "targets": targets}


@click.command(help=__doc__.splitlines()[0])
@click.argument("model_types", metavar="[MODEL_TYPE]...", nargs=-1, type=click.Choice(tuple(TINY)))
def main(model_types: tuple[str, ...]) -> None:
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for model_type in model_types or TINY:
        click.echo(f"{model_type}: measuring", err=True)
        found[model_type] = measure(model_type)
        click.echo(f"{model_type}: {found[model_type]}")
        FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
