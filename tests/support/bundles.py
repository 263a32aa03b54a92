"""Copies of bundles to be changed."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moevlm.runtime.core.manifest import digest_of


def copy_bundle(bundle: Path, folder: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(bundle, folder / "copy.moevlm"))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite manifest.json by a function that edits it in place, with the digest that its new fields have."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content["digest"] = digest_of(json.dumps(content).encode())
    path.write_text(json.dumps(content))


def rehash(bundle: Path, name: str) -> None:
    """Make manifest.json agree with a file that was changed."""
    data = (bundle / name).read_bytes()
    metadata = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({name: metadata}))
