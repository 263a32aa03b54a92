"""Whether the plans of a bundle are what its manifest says, as far as their first bytes tell; no GPU is needed."""

from __future__ import annotations

from moevlm.runtime.backends.tensorrt.plan_header import HEADER_BYTES, plan_header
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core.engine_metadata import EngineMetadata, TensorRTMetadata
from moevlm.runtime.core.errors import BundleError
from moevlm.runtime.core.gpus import sms_text


def plan_problems(bundle: Bundle, engine: EngineMetadata, built: TensorRTMetadata) -> list[str]:
    """One line for each contradiction. built: what the manifest says of the plans."""
    problems = []
    for name in engine.graphs:
        try:
            with bundle.open_file(name) as file:
                problems += [f"{name} {problem}" for problem in _problems(file, built)]
        except BundleError as error:
            problems.append(str(error))
    return problems


def _problems(file: BundleFile, metadata: TensorRTMetadata) -> list[str]:
    header = plan_header(file.read(HEADER_BYTES))
    if header is None:
        return [f"is no plan of TensorRT, manifest.json says {metadata.product} {metadata.version}"]
    found: list[tuple[str, object, object]] = [("product", header.product, metadata.product)]
    if header.product == metadata.product == "tensorrt_rtx":  # of others no more was observed
        found += [
            ("version", header.version, metadata.version),
            ("size", header.length, file.size),
            ("GPUs", sms_text(header.sms), sms_text(metadata.sms)),
        ]
    return [
        f"says {what} {says}, {'the file has' if what == 'size' else 'manifest.json says'} {other}"
        for what, says, other in found
        if says != other
    ]
