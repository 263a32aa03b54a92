"""What a TensorRT engine takes of a GPU's memory, what that leaves for the cache, and how fast it can decode at most.

Arithmetic on what the manifest says and on what GPUs are sold with: none is asked, nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from moevlm.runtime.backends.tensorrt.memory_budget import reserved
from moevlm.runtime.backends.tensorrt.needs import Needs, needs_of
from moevlm.runtime.core.engine_metadata import CostMetadata, EngineMetadata
from moevlm.runtime.core.gpu_models import GPU_MODELS, GpuModel
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.states import page_bytes, row_bytes
from moevlm.runtime.engine.pool_size import SEQUENCES, rows_of, rows_within
from moevlm.runtime.perf.limits import decode_work, experts_read

_CONTEXT_BYTES = 512 << 20  # the driver's context, TensorRT
CONTEXT = 1024  # tokens of each sequence whose decoding is predicted
LEAST_TOKENS = 8192  # of cache, below which experts had better stay on the host


class GpuFit(msgspec.Struct, frozen=True):
    """An engine on one kind of GPU.

    memory: bytes of it. fits: False where not even all experts on the host leave room for the cache.
    host_layers: sparse layers whose experts stay in the host's memory, as few as leave room if all are of one size.
    tokens: of cache.
    decode: tokens per second at most, of one sequence of CONTEXT tokens; decode_together: of `sequences` of them.
    """

    gpu: str
    memory: int
    fits: bool
    host_layers: int = 0
    tokens: int = 0
    sequences: int = 0
    decode: float = 0.0
    decode_together: float = 0.0


class MemoryReport(msgspec.Struct, frozen=True):
    """Bytes that an engine takes of any GPU, and the GPUs of its kinds.

    dense: weights of the decoder, but for experts. experts: all of them. vision: weights. workspace: of kernels while
    they run, and features of images; an estimate. driver: an allowance, see `driver_bytes`. page: of the cache, with
    page_tokens tokens. row: recurrent states of a request, or of a snapshot, in the same memory; 0 without any.
    """

    dense: int
    experts: int
    vision: int
    workspace: int
    driver: int
    page: int
    page_tokens: int
    row: int = 0
    gpus: list[GpuFit] = []

    @property
    def fixed(self) -> int:
        """All but the cache."""
        return self.dense + self.experts + self.vision + self.workspace + self.driver

    @property
    def token(self) -> float:
        """Bytes of cache for a token."""
        return self.page / self.page_tokens


def driver_bytes(engine: EngineMetadata) -> int:
    """What an engine leaves free, and what the driver and TensorRT take."""
    return reserved(bool(engine.vision)) + _CONTEXT_BYTES


def memory_report(
    model: ModelMetadata, engine: EngineMetadata, gpus: Iterable[GpuModel] = GPU_MODELS
) -> MemoryReport | None:
    """None for an engine on the CPU, and for one that is too old to say what it costs."""
    needs, cost = needs_of(engine), engine.cost
    if needs is None or cost is None:
        return None
    sparse = [layer.experts for layer in model.layers if layer.experts]
    report = MemoryReport(
        dense=cost.dense_bytes + cost.head_bytes + cost.lookup_bytes,
        experts=(cost.expert_bytes + cost.image_expert_bytes) * max(sparse, default=0),
        vision=cost.vision_bytes,
        workspace=needs.bytes,
        driver=driver_bytes(engine),
        page=page_bytes(engine.states, engine.page_size),
        page_tokens=engine.page_size,
        row=row_bytes(engine.states),
    )
    if not report.page:
        return report
    fits = [_fit(report, model, engine, cost, needs, gpu) for gpu in gpus if gpu.sm in engine.sms]
    return msgspec.structs.replace(report, gpus=fits)


def _fit(
    report: MemoryReport,
    model: ModelMetadata,
    engine: EngineMetadata,
    cost: CostMetadata,
    needs: Needs,
    gpu: GpuModel,
) -> GpuFit:
    sparse = sum(bool(layer.experts) for layer in model.layers)
    free, host = gpu.memory - report.fixed, 0
    least = -(-LEAST_TOKENS // report.page_tokens) * report.page + 2 * report.row
    if free < least and gpu.link and needs.experts_apart and sparse:
        each = report.experts / sparse
        host = min(sparse, -int((free - least) // each))
        free += int(host * each)
    rows = 0
    if report.row:
        rows = min(rows_of(max(needs.max_sequences, SEQUENCES)), rows_within(free, report.page, report.row))
    pages = min((free - rows * report.row) // report.page, needs.max_pages)
    tokens = (pages - 1) * report.page_tokens  # page 0 is no sequence's
    if tokens < report.page_tokens:
        return GpuFit(gpu.name, gpu.memory, fits=False)
    sequences = max(1, min(needs.max_sequences, tokens // CONTEXT, rows - 1 if rows else needs.max_sequences))

    def rate(batch: int) -> float:
        """Tokens per second, if all that must be read were read as fast as it can be."""
        over_link = host / sparse * experts_read(model, batch) * cost.expert_bytes if host else 0.0
        here = decode_work(model, engine, cost, CONTEXT, batch).bytes - over_link
        return batch / (here / gpu.bandwidth + (over_link / gpu.link if host else 0.0))

    return GpuFit(gpu.name, gpu.memory, True, host, tokens, sequences, rate(1), rate(sequences))
