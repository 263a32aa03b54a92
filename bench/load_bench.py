"""What loading an engine costs: seconds; peak memory after a prompt, and how much of it is not the mapped file.

    python -m bench.load_bench build/bench/1B.group32.moevlm --target cpu:int4

In this process, so one engine at a time. `make bench` leaves that bundle behind.
"""

from pathlib import Path
from time import perf_counter

import click
import numpy as np

from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.runtime.backends.selection import select
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.cli.console import console
from moevlm.runtime.core.printable import bytes_text
from moevlm.runtime.loading import load_engine
from moevlm.runtime.request.prompt import Prompt

TOKENS = 256


def memory() -> dict[str, int]:
    """Bytes by the kernel's names: VmHWM is the peak of what was resident, RssAnon what belongs to no file."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="Which engine.  [default: the one that run takes]")
def main(bundle: Path, target: str | None) -> None:
    """Load one engine, every byte of it hashed, and run a prompt of random tokens."""
    opened = Bundle.open(bundle)
    name, _ = select(opened, target)
    size = sum(opened.manifest.files[path].size for path in opened.engine_files(name))
    started = perf_counter()
    engine = load_engine(opened, name)
    seconds, model = perf_counter() - started, opened.manifest.model
    ids = np.random.default_rng(0).integers(0, model.image_token_id - 8, TOKENS)
    prompts = [Prompt.from_ids(ids, [], model)]
    Batch(engine, model, prompts, None, BatchLimits.of(prompts, engine.limits, 0)).prefill()
    used = memory()
    peak, own = bytes_text(used["VmHWM"]), bytes_text(used["RssAnon"])
    console().print(f"{name}, {bytes_text(size)}: loaded in {seconds:.2f} s, peak memory {peak}, {own} of no file")


if __name__ == "__main__":
    main()
