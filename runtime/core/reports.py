"""What the commands write as JSON. `schema` names the shape and its version; docs/json.md describes every field."""

from typing import Any

import msgspec

from moevlm.runtime.backends.tensorrt.kernel_resources import KernelsReport
from moevlm.runtime.core.manifest import ModelMetadata, TensorRTMetadata
from moevlm.runtime.core.printable import UNFIT
from moevlm.runtime.perf.machine import GpuMachine, Machine


class Report(msgspec.Struct, frozen=True, tag_field="schema"):
    """Base of all reports; a report's tag is its field `schema`."""


class TokenReport(msgspec.Struct, frozen=True):
    """One generated token. top: [[token id, log-probability], ...], the likeliest first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


class RunReport(Report, frozen=True, tag="moevlm.run/1"):
    """`moevlm run --json`."""

    target: str
    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    logprobs: list[TokenReport] | None


class EngineReport(msgspec.Struct, frozen=True):
    """One engine of a bundle; parity: "passed", "failed" or "not checked". Else as `manifest.EngineMetadata`.

    cache_bytes_per_token: of one sequence, all layers. problems: what its plans say that the manifest does not, a line
    each. kernels: None if the bundle does not say.
    """

    target: str
    dtype: str
    bytes: int
    parity: str
    block_size: int = 0
    kv_cache: str = "float32"
    sparsity: str = ""
    tensorrt: TensorRTMetadata | None = None
    problems: list[str] = []
    kernels: KernelsReport | None = None
    cache_bytes_per_token: int = 0
    built: str = ""


class SamplingReport(msgspec.Struct, frozen=True):
    """The sampling of requests that ask for none, as `sampling.SamplingParams`. temperature: 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class InspectReport(Report, frozen=True, tag="moevlm.inspect/1"):
    """`moevlm inspect --json`. model, ignored_config, left_out: as in manifest.json.

    verified: whether all hashes were checked now.
    """

    bundle: str
    bytes: int
    verified: bool
    model: ModelMetadata
    engines: list[EngineReport]
    source: dict[str, str]
    tools: dict[str, str]
    ignored_config: list[str] = []
    left_out: dict[str, int] = {}
    sampling: SamplingReport = SamplingReport()


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


def to_json(report: Report) -> str:
    """The report as indented JSON text, characters that a terminal would obey as \\u009b.

    A path that is not UTF-8 is in it with \\udcff for each byte that is not.
    """
    try:
        data = msgspec.json.encode(report)
    except UnicodeEncodeError:
        data = msgspec.json.encode(_encodable(msgspec.to_builtins(report)))
    text = msgspec.json.format(data, indent=2).decode()
    return UNFIT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value
