"""What an export costs: seconds, peak memory and nodes, against transformers' own exporter on the same checkpoint.

    python -m bench.export_bench [--large] [--no-peer]

Each export runs in a process of its own. Checkpoints are random and lie under build/bench; --large adds one of 8 GB, to
show that memory does not grow with the checkpoint.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import onnx
import onnx.inliner

from bench.random_checkpoint import config, write
from moevlm.runtime.cli.console import console, table
from moevlm.runtime.core.printable import bytes_text

FOLDER = Path("build/bench")
ONE_BILLION = {"layers": 12, "hidden": 1024, "experts": 64, "top_k": 8, "width": 384, "vocabulary": 32000}
LARGE = {"layers": 26, "hidden": 1536, "experts": 64, "top_k": 8, "width": 512, "vocabulary": 32000}

OURS = """
import sys
from moevlm.export.build import build
build(sys.argv[1], sys.argv[2], ["reference"])
"""

# The text part alone, as one component: the image encoder is left out of it, and no bundle is written.
PEER = """
import sys
import torch
from transformers import AutoModelForImageTextToText
from transformers.exporters import OnnxConfig, OnnxExporter
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
text = model.model.language_model.eval()
hidden = torch.randn(1, 6, text.config.hidden_size)
positions = torch.arange(6).view(1, 1, 6).expand(3, 1, 6).contiguous()
inputs = {"inputs_embeds": hidden, "position_ids": positions, "use_cache": False}
program, _ = OnnxExporter().export_program(text, inputs, OnnxConfig(dynamic=True))
OnnxExporter.save_program(program, sys.argv[2])
"""


def measure(script: str, *arguments: str) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a Python process."""
    started = time.perf_counter()
    watch = f"{script}\nprint(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", watch, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    return time.perf_counter() - started, 1024 * int(done.stdout.split()[-2])


def nodes(path: Path) -> str:
    """Nodes of a graph, and of the same graph with every function's body in the place of its calls."""
    model = onnx.load(path, load_external_data=False)
    inlined = onnx.inliner.inline_local_functions(model)
    return f"{len(model.graph.node)} ({len(inlined.graph.node)})"


def ours(checkpoint: Path) -> dict[str, object]:
    """`--target reference` into a bundle that is removed again."""
    bundle = checkpoint.with_suffix(".moevlm")
    seconds, peak = measure(OURS, str(checkpoint), str(bundle))
    result = {"export": f"moevlm, {checkpoint.name}", "seconds": seconds, "peak_bytes": peak}
    result["nodes"] = nodes(bundle / "graphs" / "decoder.onnx")
    shutil.rmtree(bundle)
    return result


def peer(checkpoint: Path) -> dict[str, object]:
    """transformers' OnnxExporter on the language model alone."""
    path = checkpoint.with_suffix(".onnx")
    seconds, peak = measure(PEER, str(checkpoint), str(path))
    result = {
        "export": f"transformers, {checkpoint.name}",
        "seconds": seconds,
        "peak_bytes": peak,
        "nodes": nodes(path),
    }
    for file in checkpoint.parent.glob(f"{path.name}*"):
        file.unlink()
    return result


@click.command()
@click.option("--large", is_flag=True, help="Also a checkpoint of 8 GB (needs 28 GB of disk).")
@click.option("--peer/--no-peer", "with_peer", default=True, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(large: bool, with_peer: bool, output: Path | None) -> None:
    """Measure exports of random checkpoints."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    sizes = {"1B": ONE_BILLION} | ({"4B": LARGE} if large else {})
    results = []
    for name, shape in sizes.items():
        checkpoint = FOLDER / name
        if not (checkpoint / "model.safetensors.index.json").exists():
            click.echo(f"writing a random checkpoint to {checkpoint}", err=True)
            write(checkpoint, config(**shape))
        click.echo(f"exporting {name}", err=True)
        results.append(ours(checkpoint))
    if with_peer:
        click.echo("exporting 1B with transformers (minutes)", err=True)
        results.append(peer(FOLDER / "1B"))
    rows = [
        (str(r["export"]), f"{r['seconds']:.1f} s", bytes_text(int(str(r["peak_bytes"]))), str(r["nodes"]))
        for r in results
    ]
    console().print(table("export to ONNX, fp32", ("what", "time", "peak memory", "nodes (inlined)"), rows))
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
