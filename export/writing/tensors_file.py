"""A safetensors file, written one slice of a tensor at a time."""

import math
from collections.abc import Mapping

from moevlm.export.graph.weights import Weight, slices
from moevlm.export.writing.model_file import PAGE
from moevlm.export.writing.streamed_file import StreamedFile
from moevlm.runtime.bundle import safetensors
from moevlm.runtime.core.dtypes import dtype_of
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.progress import Progress


def tensor_bytes(weight: Weight) -> int:
    """Its size in the file."""
    return math.prod(weight.shape) * weight.dtype.itemsize


def header_of(tensors: Mapping[str, Weight]) -> bytes:
    """The file up to its first tensor, which begins at a page."""
    return safetensors.header_of({name: (dtype_of(w.dtype), w.shape) for name, w in tensors.items()}, PAGE)


def write_tensors(tensors: Mapping[str, Weight], file: StreamedFile, progress: Progress | None = None) -> None:
    """All tensors in order. Raises BuildError, by name, for one that cannot be what its recipe makes of it; OSError."""
    header = header_of(tensors)
    total = len(header) + sum(map(tensor_bytes, tensors.values()))
    file.write(header)
    for name, weight in tensors.items():
        try:
            for piece in slices(weight):
                file.write(piece)
                if progress is not None:
                    progress(file.size, total)
        except ValueError as error:
            raise BuildError(f"{name}: {error}") from error
