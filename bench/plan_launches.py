"""What a TensorRT-RTX engine launches, read from its file: no GPU is needed.

    python -m bench.plan_launches ENGINE.plan

Such a file has its list of operations as text, a graph for each optimization profile. What stands there is what the
GPU is given: copies, masks and kernels that replaced a plugin are visible before any GPU runs it.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

from moevlm.runtime.cli.console import console, table

_GRAPH = re.compile(r"^main \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_OPERATION = re.compile(r"^  (\w+)=\{ name=(?:\"([^\"]*)\"|(\S+))(.*)$", re.MULTILINE)
_TENSORS = {
    side: re.compile(rf" {side}(?:_args)?=\{{ ?((?:\"[^\"]*\" ?)*)\}}") for side in ("input", "output")
}  # a kernel's are called input_args
_PROFILE = re.compile(r" \[profile (\d+)\]")
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*?)\]")
_NOT_LAUNCHED = ("shape_call", "signal", "wait")
PLUGIN = "custom_layer"


@dataclass(frozen=True)
class Launch:
    """One operation of the GPU, a plugin's all together.

    kind: TensorRT's word: function (a generated kernel), fully_connected, runtime_fusion (a product and what follows
    it), custom_layer (a plugin), copy. inputs, outputs: names of tensors, those of the network under their own names.
    layers: the ONNX nodes that it computes.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def plugin(self) -> str:
        """The op of a plugin; "" for anything else. Nodes without a name are called node_OP_NUMBER."""
        return self.layers[0].removeprefix("node_").rpartition("_")[0] if self.kind == PLUGIN else ""


def launches(plan: bytes) -> list[list[Launch]]:
    """The launches of each optimization profile, in order. Raises ValueError if there are none."""
    profiles: dict[int, list[Launch]] = {}
    for found in _GRAPH.finditer(plan.decode("latin-1")):
        text = found.group(1)
        if "shape_call={" not in text:  # the body of a runtime_fusion
            continue
        profile = _PROFILE.search(text)
        into = profiles.setdefault(int(profile.group(1)) if profile else 0, [])
        into += [_launch(*line.groups()) for line in _OPERATION.finditer(text) if line.group(1) not in _NOT_LAUNCHED]
    if not profiles:
        raise ValueError("the file has no list of operations (allowed: an engine of TensorRT-RTX)")
    return [profiles[i] for i in sorted(profiles)]


def _launch(kind: str, quoted: str | None, bare: str | None, rest: str) -> Launch:
    tensors = {}
    for side, pattern in _TENSORS.items():
        match = pattern.search(rest)
        tensors[side] = tuple(map(_tensor, re.findall(r'"([^"]*)"', match.group(1)))) if match else ()
    return Launch(kind, _PROFILE.sub("", quoted or bare or ""), *tensors.values(), tuple(_LAYER.findall(rest)))


def _tensor(name: str) -> str:
    """x of "x [profile 1].1", which is the network's; names of TensorRT's own stay what they are."""
    return re.sub(r"\.1$", "", _PROFILE.sub("", name))


def by_layer(found: list[Launch], plugin: str) -> list[list[Launch]]:
    """The launches from each plugin of this op up to the next: as many as a layer has, but for the last."""
    starts = [i for i, launch in enumerate(found) if launch.plugin == plugin]
    return [found[start:stop] for start, stop in zip(starts, [*starts[1:], len(found)], strict=True)]


@click.command()
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(plan: Path) -> None:
    """List what an engine launches, for each optimization profile."""
    try:
        profiles = launches(plan.read_bytes())
    except ValueError as error:
        raise click.ClickException(f"{plan}: {error}") from error
    for i, found in enumerate(profiles):
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(launch.kind for launch in found).items())
        rows = [(str(j), one.kind, one.plugin or one.name, ", ".join(one.layers)) for j, one in enumerate(found)]
        console().print(table(f"profile {i}: {len(found)} launches ({kinds})", ("", "kind", "name", "computes"), rows))


if __name__ == "__main__":
    sys.exit(main())
