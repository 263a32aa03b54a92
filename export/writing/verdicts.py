"""Parity's verdicts in a bundle's manifest: whether they can be written, and writing them."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.export.writing.destination import locked
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BuildError
from moevlm.runtime.core.manifest import FileMetadata


def reserve(bundle: Bundle) -> None:
    """Write as much as the manifest has, and drop it: what takes hours should not fail at its end for a full disk.

    Raises BuildError.
    """
    with BundleWriter(bundle.directory, changes=bundle) as writer:
        writer.add_bytes("manifest", bytes(2 * len(msgspec.json.encode(bundle.manifest))))


def note(checked: Bundle, verdicts: Mapping[str, Any], progress: Callable[[str, int, int], None]) -> None:
    """Write verdicts, by engine, into the manifest as it is now: other engines may have been added meanwhile.

    Raises BuildError if one of those that were checked is not the same any more.
    """
    bundle = checked.directory
    with locked(bundle, progress):
        now = Bundle.open(bundle)
        for name in verdicts:
            if name not in now.manifest.engines or _metadata(now, name) != _metadata(checked, name):
                raise BuildError(f"{name} of {bundle} was built anew while it was checked: its verdict is not noted")
        with BundleWriter(bundle, changes=now) as writer:
            writer.keep(now)
            writer.commit(msgspec.structs.replace(now.manifest, parity={**now.manifest.parity, **verdicts}))


def _metadata(bundle: Bundle, name: str) -> tuple[EngineMetadata, dict[str, FileMetadata]]:
    """All that the manifest says of an engine, hashes included."""
    files = bundle.manifest.files
    return bundle.manifest.engines[name], {path: files[path] for path in bundle.engine_files(name)}
