"""An estimate of what parity of a model takes, before it starts: memory, bytes to read, time."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from moevlm.export.graph.weights import Weight
from moevlm.export.model import CanonicalModel
from moevlm.export.parity.cases import Case
from moevlm.export.parity.stored_reference import Storage
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.printable import bytes_text

_BASE = 600_000_000  # Python, torch and transformers, before any weight
_PARTS = 2.5  # a part in float32 and what it is made of: its bytes on disk and, where experts are fused, a copy
_LOGITS = 3  # those expected, an engine's, and what comparing them takes
_RUNS = 3  # hidden states of a quantized engine are kept for so many runs over all tokens
_SECONDS = 1e-8  # a parameter in a pass, on two cores of 2023


@dataclass(frozen=True)
class Needs:
    """memory: bytes in use at the most, without engines, whose weights are mapped. engines: bytes of the largest of
    them. largest: bytes of the largest part of the model, float32. read: bytes of weights. seconds: on an idle machine.
    """

    memory: int
    engines: int
    largest: int
    read: int
    seconds: float

    @classmethod
    def of(cls, model: CanonicalModel, cases: Sequence[Case], bundle: Bundle, names: Iterable[str]) -> Self:
        """names: of the engines that will be checked."""
        files, names = bundle.manifest.files, list(names)
        sizes = [sum(files[file].size for file in bundle.engine_files(name)) for name in names]
        engines = [bundle.manifest.engines[name] for name in names]
        quantized = sum(engine.group_size > 0 and not engine.sms for engine in engines)
        rewritten = sum(Storage.of(engine) != Storage() for engine in engines)
        parts = _parts(model.vision_weights) + _parts(model.decoder_weights)
        decoder, largest, tokens = model.config.decoder, max(parts.values()), sum(len(case.whole.ids) for case in cases)
        memory = _BASE + _PARTS * largest + _LOGITS * 4 * tokens * decoder.vocabulary
        if quantized:
            memory += _RUNS * 4 * tokens * decoder.hidden * len(decoder.layers)
        passes = 2 + rewritten + 2 * quantized
        return cls(
            memory=int(memory),
            engines=max(sizes),
            largest=largest,
            read=passes * sum(file.size for file in bundle.manifest.source.values()) + sum(sizes),
            seconds=passes * sum(parts.values()) / 4 * _SECONDS,
        )

    def __str__(self) -> str:
        return (
            f"needs about {bytes_text(self.memory)} of memory beside engines of up to {bytes_text(self.engines)}; "
            f"reads {bytes_text(self.read)}; takes some {max(1, round(self.seconds / 60))} min on two free cores"
        )

    def require(self, available: int | None) -> None:
        """Raise RequestError if there is clearly too little memory. available: bytes; None if unknown."""
        if available is not None and available < 0.8 * self.memory:
            raise RequestError(
                f"parity needs about {bytes_text(self.memory)} of memory, {bytes_text(available)} are available "
                f"(a layer of this model takes {bytes_text(self.largest)} in float32)"
            )


def _parts(weights: Mapping[str, Weight]) -> Counter[str]:
    """Bytes in float32 of what is in memory together: a layer, or what stands beside the layers."""
    sizes: Counter[str] = Counter()
    for name, weight in weights.items():
        part = re.match(r"\w+\.\d+\.|\w+", name)
        assert part is not None
        sizes[part[0]] += 4 * int(np.prod(weight.shape))
    return sizes
