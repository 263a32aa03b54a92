"""A lowered graph as the files that TensorRT's parser reads."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from moevlm.export.writing.model_file import data_bytes, graph_bytes, plan, write_data
from moevlm.export.writing.streamed_file import StreamedFile
from moevlm.runtime.core.progress import Progress


def write_onnx(model: ir.Model, path: Path, progress: Progress | None = None) -> None:
    """`path`, and `path`.data with the large weights, streamed. Raises as `write_data`, and OSError."""
    spans = plan(model)
    if data_bytes(spans):
        data = StreamedFile(path.with_name(f"{path.name}.data"))
        try:
            write_data(spans, data, progress)
            data.close()
        finally:
            data.abort()
    with _programs_are_bytes():
        path.write_bytes(graph_bytes(model, spans, f"{path.name}.data"))


@contextmanager
def _programs_are_bytes() -> Iterator[None]:
    """onnx_ir warns of every string attribute that is no text; ONNX itself leaves that to the op."""
    logger = logging.getLogger("onnx_ir.serde")

    def is_other(record: logging.LogRecord) -> bool:
        return "instead bytes" not in str(record.msg)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
