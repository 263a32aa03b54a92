"""`moevlm parity`."""

import os
from pathlib import Path
from typing import Any

import click

from moevlm.runtime.cli.command_line import complete_target, require, require_apart
from moevlm.runtime.cli.console import console, progress_bar, publish
from moevlm.runtime.cli.option_types import OutputFile, WholeNumber
from moevlm.runtime.core.printable import in_shell


@click.command(short_help="Check every engine of a bundle against Hugging Face.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="Where the bundle came from.")
@click.option(
    "--lora", metavar="DIR", type=click.Path(path_type=Path), help="The LoRA adapter that the bundle was built with."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    shell_complete=complete_target,
    help="Which engines; repeatable.  [default: all that run here]",
)
@click.option(
    "--seed",
    metavar="N",
    type=WholeNumber(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the random prompts and images.",
)
@click.option("--quick", is_flag=True, help="Two prompts and few steps, for a first look; notes no verdict.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Also give perplexity and KL of each engine on this file."
)
@click.option(
    "--max-tokens", metavar="N", type=WholeNumber(16), help="How many tokens of --text to read.  [default: 4096]"
)
@click.option("--json", "output", type=OutputFile(), help="Also write the results here; - prints only them.")
def parity(
    bundle: Path,
    checkpoint: Path,
    lora: Path | None,
    targets: tuple[str, ...],
    seed: int,
    quick: bool,
    text: Path | None,
    max_tokens: int | None,
    output: Path | None,
) -> None:
    """Hold canonical PyTorch and each engine to Hugging Face on random prompts.

    Exit status 0 if all that was compared agrees, 1 on a mismatch, 2 if it could not be carried out. The last line says
    what could not be compared.

    "passed" means that the kernels are right. What rounding the weights costs is shown beside the checks, without a
    limit; --text shows it on a text of your own.
    """
    require_apart([output], [bundle, checkpoint, lora, text])
    if max_tokens is not None and text is None:
        raise click.UsageError("--max-tokens is for --text")
    require("transformers", "export")
    # Read by torch at its import: threads that spin while they wait cost ten times the work on cores that are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # And by transformers: else it reads several tensors of a layer ahead, which takes memory.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    from moevlm.export.parity.report import table_of
    from moevlm.export.parity.run import check_parity
    from moevlm.runtime.bundle.reader import Bundle
    from moevlm.runtime.core.reports import to_json
    from moevlm.runtime.request.images.fields import IMAGE_FILE

    with progress_bar() as progress:
        options: Any = {"lora": lora, "seed": seed, "quick": quick, "text": text, "progress": progress}
        if max_tokens is not None:
            options["max_tokens"] = max_tokens
        report = check_parity(bundle, checkpoint, targets, **options)
    publish(table_of(report), to_json(report), output)
    if not report.passed:
        click.get_current_context().exit(1)
    files = Bundle.open(bundle).manifest.files
    if str(output) != "-" and files.keys() >= {"tokenizer.json", "chat_template.jinja"}:
        image = " --image FILE" if IMAGE_FILE in files else ""
        console().print(f'next: moevlm run {in_shell(bundle)} --prompt "..."{image}')
