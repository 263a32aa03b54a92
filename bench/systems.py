"""What the CPU benchmark measures, and on which systems."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.peers import llama_cpp_setup, openvino_setup
from bench.peers.moevlm_bundle import bundle_of
from bench.peers.protocol import Request


@dataclass(frozen=True)
class System:
    """name: in tables and in the results. module: of bench.peers, run by python with weights of so many bits.

    target, group_size: an engine of our own, and how many of its weights share a scale.
    """

    name: str
    module: str
    bits: int
    python: Path = Path(sys.executable)
    target: str = ""
    group_size: int = 32

    def command(self, checkpoint: Path, threads: int) -> list[str]:
        options: dict[str, object] = {"--checkpoint": checkpoint, "--bits": self.bits, "--threads": threads}
        if self.target:
            options |= {"--target": self.target, "--group-size": self.group_size}
        module = f"bench.peers.{self.module}"
        return [str(self.python), "-m", module, *(str(part) for pair in options.items() for part in pair)]


@dataclass(frozen=True)
class Metric:
    """One row of results. unit: "tok/s", of all sequences together, or "s". systems: names, ours first."""

    name: str
    request: Request
    unit: str
    systems: tuple[str, ...]

    def value(self, seconds: float, tokens: int) -> float:
        """In the metric's unit."""
        return seconds if self.unit == "s" else tokens / seconds


OURS, STOCK = "moevlm cpu:int{}", "moevlm ort-cpu:int{}"
WIDE = "moevlm cpu:int4, group 128"
LLAMA, OPENVINO = "llama.cpp Q{}_0", "OpenVINO int{}"
HUGGING_FACE = "transformers bf16"
SYSTEMS = (
    *(
        System(name.format(bits), "moevlm_bundle", bits, target=name.format(bits).split()[1])
        for bits in (4, 8)
        for name in (OURS, STOCK)
    ),
    System(WIDE, "moevlm_bundle", 4, target="cpu:int4", group_size=128),
    *(System(LLAMA.format(bits), "llama_cpp", bits, llama_cpp_setup.PYTHON) for bits in (4, 8)),
    *(System(OPENVINO.format(bits), "openvino_text", bits, openvino_setup.PYTHON) for bits in (4, 8)),
    System(HUGGING_FACE, "transformers_bf16", 16),
)


def _of(bits: int) -> tuple[str, ...]:
    wide = (WIDE,) if bits == 4 else ()
    return OURS.format(bits), *wide, *(name.format(bits) for name in (STOCK, LLAMA, OPENVINO))


METRICS = (
    Metric("decode, 4-bit, 256 past", Request("decode", 64, 256), "tok/s", _of(4)),
    Metric("decode, 8-bit, 256 past", Request("decode", 64, 256), "tok/s", (*_of(8), HUGGING_FACE)),
    Metric("decode, 4-bit, 4096 past", Request("decode", 32, 4096), "tok/s", _of(4)),
    Metric("prefill of 256, 4-bit", Request("prefill", 256), "tok/s", (*_of(4), HUGGING_FACE)),
    Metric("prefill of 256, 8-bit", Request("prefill", 256), "tok/s", (*_of(8), HUGGING_FACE)),
    Metric("8 sequences, 4-bit, 256 past", Request("decode", 32, 256, batch=8), "tok/s", _of(4)),
    Metric(
        "8 clients at once, 4-bit, 256 past",
        Request("clients", 32, 256, batch=8),
        "tok/s",
        (OURS.format(4), LLAMA.format(4)),
    ),
    Metric(
        "first token, 448 x 448 image and 256 text",
        Request("first_token", 256, image_size=448),
        "s",
        (OURS.format(4), WIDE, STOCK.format(4), HUGGING_FACE),
    ),
)


def prepare(checkpoint: Path, systems: Sequence[System]) -> None:
    """What the systems need before they start: our bundle, the peers and their files. Does what is not done yet."""
    from moevlm.export.build import add_targets, build
    from moevlm.runtime.bundle.reader import Bundle

    for group_size in sorted({system.group_size for system in systems if system.target}):
        ours = [system.target for system in systems if system.target and system.group_size == group_size]
        bundle = bundle_of(checkpoint, group_size)
        if not bundle.exists():
            build(checkpoint, bundle, ours, group_size=group_size)
        missing = [target for target in ours if target not in Bundle.open(bundle).manifest.engines]
        if missing:
            add_targets(bundle, checkpoint, missing, group_size=group_size)
    for module, peer in {"llama_cpp": llama_cpp_setup, "openvino_text": openvino_setup}.items():
        bits = [system.bits for system in systems if system.module == module]
        if bits:
            peer.set_up()
            peer.prepare(checkpoint, bits)
