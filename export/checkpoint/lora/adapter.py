"""An adapter's matrices by the module that they change: W becomes W + scale * B A (Hu et al. 2021, equation 3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from moevlm.export.checkpoint.hashes import Fingerprint
from moevlm.export.checkpoint.lora.settings import CONFIG, settings_of
from moevlm.export.checkpoint.safetensors_file import Stored, read_header
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.errors import CheckpointError, one_line
from moevlm.runtime.core.manifest import FileMetadata

WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
_PREFIX = "base_model.model."  # of PEFT's wrappers around the model
_WRAPPED = ".base_layer"  # a module that two updates change is wrapped twice
_ENDS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
_FLOATS = tuple(DTYPES[name].numpy for name in ("bfloat16", "float16", "float32"))


@dataclass(frozen=True)
class Update:
    """a [experts * rank, in], b [out, rank * experts]: of all experts of a layer, or of one matrix (experts 1).

    Expert e has rows e * rank ... of a, and every experts-th column of b from e on.
    """

    module: str
    a: Stored
    b: Stored
    rank: int
    scale: float

    @property
    def experts(self) -> int:
        return self.a.shape[0] // self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of one matrix that it changes."""
        return self.b.shape[0], self.a.shape[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of scale * B A, of one matrix: [stop - start, in] float32."""
        a, b = (part.astype(np.float32) for part in (self.a.rows(0, self.a.shape[0]), self.b.rows(start, stop)))
        return np.float32(self.scale) * (b @ a)

    def of_experts(self, start: int, stop: int) -> np.ndarray:
        """scale * B A of experts start to stop: [stop - start, out, in] float32."""
        a = self.a.rows(start * self.rank, stop * self.rank).astype(np.float32)
        b = self.b.rows(0, self.b.shape[0]).reshape(-1, self.rank, self.experts)[..., start:stop].astype(np.float32)
        return np.float32(self.scale) * (b.transpose(2, 0, 1) @ a.reshape(stop - start, self.rank, -1))


@dataclass(frozen=True)
class Adapter:
    """updates: by the module's name in transformers; experts of a layer have one for each of their tensors."""

    directory: Path
    updates: Mapping[str, tuple[Update, ...]]
    _fingerprint: Fingerprint

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Raises CheckpointError for a file that is missing or damaged, or a tensor that is none of an adapter's."""
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"no adapter directory at {directory}")
        settings, pairs = settings_of(directory), dict[str, dict[str, Stored]]()
        for name, tensor in read_header(directory / WEIGHTS).items():
            end = next((end for end in _ENDS if name.endswith(end)), None)
            if end is None or not name.startswith(_PREFIX) or len(tensor.shape) != 2 or tensor.dtype not in _FLOATS:
                raise CheckpointError(
                    f"tensor {one_line(name, 80)} of {directory / WEIGHTS}, {list(tensor.shape)} {tensor.dtype}, "
                    "cannot be merged (allowed: lora_A and lora_B of linear layers and of fused experts)"
                )
            pairs.setdefault(name.removesuffix(end), {})[_ENDS[end]] = tensor
        updates: dict[str, list[Update]] = {}
        for path, pair in pairs.items():
            module = path.removeprefix(_PREFIX).replace(_WRAPPED, "")
            rank = settings.rank_of(module)
            missing = {*_ENDS.values()} - {*pair}
            if missing or pair["a"].shape[0] != pair["b"].shape[1] or pair["a"].shape[0] % rank:
                shapes = ", ".join(f"lora_{part.upper()} {list(pair[part].shape)}" for part in sorted(pair))
                raise CheckpointError(f"the adapter's {one_line(module, 80)} has {shapes} (its rank is {rank})")
            updates.setdefault(module, []).append(Update(module, pair["a"], pair["b"], rank, settings.scale(module)))
        if not updates:
            raise CheckpointError(f"{directory / WEIGHTS} has no tensors")
        found = {module: tuple(each) for module, each in updates.items()}
        return cls(directory, found, Fingerprint(directory, FILES))

    def fingerprint(self) -> dict[str, FileMetadata]:
        """sha256 and size of both files, by file name. Computed at most once."""
        return dict(self._fingerprint.result())
