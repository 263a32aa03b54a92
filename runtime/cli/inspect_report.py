"""What `moevlm inspect` writes as JSON."""

from typing import Any

import msgspec

from moevlm.runtime.backends.base import KernelsReport
from moevlm.runtime.backends.registry import Backends
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import TensorRTMetadata
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.reports import Report
from moevlm.runtime.core.states import row_bytes
from moevlm.runtime.perf.limits import cache_bytes_per_token
from moevlm.runtime.perf.memory import MemoryReport, memory_report
from moevlm.runtime.request.generation_file import FIELDS, GENERATION, released_sampling


class EngineReport(msgspec.Struct, frozen=True):
    """One engine of a bundle; parity: "passed", "failed" or "not checked". Else as `engine_metadata.EngineMetadata`.

    not_compared: what parity could not compare, such as images.

    cache_bytes_per_token: of one sequence, all layers. state_bytes: of its recurrent states. problems: what its plans
    say that the manifest does not, a line each. kernels: None if the bundle does not say. memory: of an engine on a
    GPU.
    """

    target: str
    dtype: str
    bytes: int
    parity: str
    group_size: int = 0
    kv_cache: str = "float32"
    sparsity: str = ""
    recoded: dict[str, int] = {}
    weight_errors: dict[str, float] = {}
    tensorrt: TensorRTMetadata | None = None
    problems: list[str] = []
    kernels: KernelsReport | None = None
    cache_bytes_per_token: int = 0
    state_bytes: int = 0
    built: str = ""
    memory: MemoryReport | None = None
    not_compared: list[str] = []


class SamplingReport(msgspec.Struct, frozen=True):
    """The sampling of requests that ask for none, as `sampling.SamplingParams`. temperature: 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class InspectReport(Report, frozen=True, tag="moevlm.inspect/3"):
    """`moevlm inspect --json`. model, ignored_config, left_out, stored_as: as in manifest.json.

    verified: whether all hashes were checked now.
    """

    bundle: str
    bytes: int
    verified: bool
    model: ModelMetadata
    engines: list[EngineReport]
    source: dict[str, str]
    tools: dict[str, str]
    ignored_config: list[str]
    left_out: dict[str, int]
    stored_as: dict[str, int]
    sampling: SamplingReport


def inspect_report(bundle: Bundle, verified: bool) -> InspectReport:
    """What the manifest and the small files say. verified: whether all hashes were checked. Raises BundleError."""
    backends = Backends()
    manifest, sampling = bundle.manifest, released_sampling(bundle.optional_text(GENERATION))
    return InspectReport(
        bundle=str(bundle.directory),
        bytes=sum(metadata.size for metadata in manifest.files.values()),
        verified=verified,
        model=manifest.model,
        engines=[
            EngineReport(
                target=name,
                dtype=engine.dtype,
                bytes=sum(manifest.files[path].size for path in bundle.engine_files(name)),
                parity=_verdict(manifest.parity.get(name)),
                group_size=engine.group_size,
                kv_cache=engine.kv_cache,
                cache_bytes_per_token=cache_bytes_per_token(engine),
                state_bytes=row_bytes(engine.states),
                built=engine.built,
                sparsity=engine.sparsity,
                recoded=engine.recoded,
                weight_errors=engine.weight_errors,
                tensorrt=engine.tensorrt,
                problems=backends.of(engine).problems(bundle, engine),
                kernels=backends.of(engine).kernels(bundle, engine),
                memory=memory_report(manifest.model, engine),
                not_compared=_not_compared(manifest.parity.get(name)),
            )
            for name, engine in sorted(manifest.engines.items())
        ],
        source={name: metadata.sha256 for name, metadata in manifest.source.items()},
        tools=manifest.tools,
        ignored_config=list(manifest.ignored_config),
        left_out=manifest.left_out,
        stored_as=manifest.stored_as,
        sampling=SamplingReport(**{name: getattr(sampling, name) for name in FIELDS}),
    )


def _verdict(parity: Any) -> str:
    result = parity.get("result") if isinstance(parity, dict) else None
    return result if result in ("passed", "failed") else "not checked"


def _not_compared(parity: Any) -> list[str]:
    found = parity.get("not_compared") if isinstance(parity, dict) else None
    return [part for part in found if isinstance(part, str)] if isinstance(found, list) else []
