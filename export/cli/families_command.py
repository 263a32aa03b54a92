"""`moevlm families`."""

import click

from moevlm.runtime.cli.command_line import require
from moevlm.runtime.cli.console import console, folded


@click.command(short_help="List the model families that can be built.")
def families() -> None:
    """List the model families that can be built, by the model_type of their config.json."""
    require("torch", "export")
    from moevlm.export.families.table import HEADS, rows, targets

    for name, checkpoints, *others in rows():
        told = (folded(f"  {head}: {text}", "    ") for head, text in zip(HEADS[2:], others, strict=True))
        console().print("\n".join((folded(f"{name}  {checkpoints}", "    "), *told, "")))
    held = "held to transformers: tiny random models in float32, the largest relative difference of logits"
    console().print(folded(held, "  "))
    console().print(f"built and checked for: {', '.join(targets())} (not run on a GPU)")
    console().print("next, for a checkpoint or its config.json: moevlm build CHECKPOINT --dry-run")
