"""What `moevlm bench latency` writes as JSON."""

import msgspec

from moevlm.runtime.core.reports import Report
from moevlm.runtime.perf.machine import GpuMachine, Machine


class Seconds(msgspec.Struct, frozen=True):
    """Of one stage over the repeats, in seconds."""

    median: float
    minimum: float
    maximum: float


class Limit(msgspec.Struct, frozen=True):
    """What bounds a stage on this machine.

    bytes: that must be read. flops: operations that must be done. seconds: that this takes at least. bound: "memory" or
    "arithmetic". fraction: seconds over the measured median, 1 at the limit.
    """

    bytes: int
    flops: int
    seconds: float
    bound: str
    fraction: float


class LatencyReport(msgspec.Struct, frozen=True):
    """`moevlm bench latency --json`, one entry of `results` per target.

    graphs: of an engine on a GPU, whether it replays recorded decode steps: "replayed", or "refused: why".
    """

    target: str
    threads: int | None
    load_seconds: float
    vision: Seconds | None
    prefill: Seconds
    decode_token: Seconds
    first_token: Seconds
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    vision_limit: Limit | None = None
    prefill_limit: Limit | None = None
    decode_limit: Limit | None = None
    graphs: str | None = None


class BenchReport(Report, frozen=True, tag="moevlm.bench.latency/1"):
    """`moevlm bench latency --json`. image_tokens are part of prompt_tokens."""

    bundle: str
    prompt_tokens: int
    image_tokens: int
    image_size: int
    new_tokens: int
    repeats: int
    results: list[LatencyReport]
    machine: Machine | None = None
    gpu: GpuMachine | None = None
