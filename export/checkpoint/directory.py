"""A Hugging Face checkpoint directory: config.json, safetensors shards, and the hashes of both."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from moevlm.export.checkpoint import side_files
from moevlm.export.checkpoint.files import find, read_json
from moevlm.export.checkpoint.hashes import Fingerprint, require_known_hashes
from moevlm.export.checkpoint.lora.adapter import FILES, Adapter
from moevlm.export.checkpoint.safetensors_file import Stored
from moevlm.export.checkpoint.shards import read_shards, some
from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.core.manifest import FileMetadata, Manifest

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"  # what it says of weights counts where config.json says nothing
_ADAPTER = "adapter/"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name, as on the Hugging Face hub


@dataclass(frozen=True)
class Checkpoint:
    """config: config.json as it is. tensors: every tensor, by its name on disk, unread. shards: file names.

    adapter: to be merged into the weights; None for none.

    Nothing is held open. `close` (or leaving a `with` block) stops hashing that is still under way.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    shards: tuple[str, ...]
    _fingerprint: Fingerprint
    adapter: Adapter | None = None

    @classmethod
    def open(cls, directory: str | Path, adapter: str | Path | None = None) -> Self:
        """Read config.json and every shard's header; raises CheckpointError if anything is missing or inconsistent.

        adapter: a folder with a LoRA adapter, as PEFT saves it.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"no checkpoint directory at {directory}{download_hint(directory)}")
        config = read_json(directory, CONFIG)
        shards, tensors = read_shards(directory)
        stated = (CONFIG, MODELOPT) if find(directory, MODELOPT) else (CONFIG,)
        merged = Adapter.open(adapter) if adapter else None
        return cls(directory, config, tensors, shards, Fingerprint(directory, (*stated, *shards)), merged)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop hashing in the background."""
        self._fingerprint.cancel()

    def weight(self, name: str) -> Stored:
        """The tensor of that name; the same object each time. Raises CheckpointError if there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name}, which its config.json calls for") from None

    def chat_template(self) -> str | None:
        """The text of the chat template that counts, see `side_files`; None without one. Raises CheckpointError."""
        found = side_files.chat_template(self.directory)
        return found.text if found else None

    @property
    def hashed(self) -> tuple[str, ...]:
        """The files that say what the weights are: config.json, hf_quant_config.json if it is there, the shards."""
        return self._fingerprint.names

    def start_hashing(self) -> None:
        """Begin to hash the files that count in a background thread; `fingerprint` waits for it."""
        self._fingerprint.start()

    def fingerprint(self) -> dict[str, FileMetadata]:
        """sha256 and size of every file that says what the weights are, by name. Computed at most once.

        Those of an adapter stand behind `adapter/`.
        """
        own = dict(self._fingerprint.result())
        of_adapter = self.adapter.fingerprint() if self.adapter else {}
        return own | {f"{_ADAPTER}{name}": metadata for name, metadata in of_adapter.items()}

    @property
    def adapter_files(self) -> tuple[str, ...]:
        """Names of the adapter's files in the fingerprint."""
        return tuple(f"{_ADAPTER}{name}" for name in FILES) if self.adapter else ()

    def path(self, name: str) -> Path:
        """Of a file that the fingerprint names."""
        if self.adapter and name.startswith(_ADAPTER):
            return self.adapter.directory / name.removeprefix(_ADAPTER)
        return self.directory / name

    def verify(self) -> tuple[str, ...]:
        """Compare with the hashes known beforehand (see `known_hashes`); returns the names that were compared.

        Raises CheckpointError on a mismatch, naming the file and both hashes. Computes nothing if none is known.
        """
        return require_known_hashes(self._fingerprint)


def require_same_files(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `checkpoint` has the files, by name and size, that the bundle was exported from.

    That is known at once, while a hash takes a second per gigabyte.
    """
    names = (*checkpoint.hashed, *checkpoint.adapter_files)
    merged = any(name.startswith(_ADAPTER) for name in manifest.source)
    if merged != (checkpoint.adapter is not None):
        told = (
            "has a LoRA adapter in its weights: name it with --lora" if merged else "has no LoRA adapter in its weights"
        )
        raise CheckpointError(f"the bundle {told}")
    if set(names) != set(manifest.source):
        raise CheckpointError(
            f"{checkpoint.directory} is not the checkpoint that the bundle was exported from: "
            f"it has {some(sorted(names))}, the bundle says {some(sorted(manifest.source))}"
        )
    for name, expected in manifest.source.items():
        size = checkpoint.path(name).stat().st_size
        if size != expected.size:
            raise CheckpointError(
                f"{checkpoint.path(name)} is not the file that the bundle was exported from: "
                f"it has {size} bytes, the bundle says {expected.size}"
            )


def require_same_source(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless `checkpoint` is, byte for byte, the one that the bundle was exported from."""
    require_same_files(manifest, checkpoint)
    actual = checkpoint.fingerprint()
    for name, expected in manifest.source.items():
        if actual[name].sha256 != expected.sha256:
            raise CheckpointError(
                f"{checkpoint.path(name)} is not the file that the bundle was exported from: "
                f"its sha256 is {actual[name].sha256}, the bundle says {expected.sha256}"
            )


def download_hint(directory: Path) -> str:
    """For an error: how to fetch what stands where a folder is meant; empty for what is no name on the hub."""
    named = _HUB_NAME.fullmatch(str(directory)) and directory.name != CONFIG and not directory.exists()
    return f" (hf download {directory} --local-dir DIR fetches it)" if named else ""
