"""Copies of bundles to be changed."""

import hashlib
import json
import shutil
from pathlib import Path


def copy_bundle(bundle: Path, folder: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(bundle, folder / "copy.moevlm"))


def rehash(bundle: Path, name: str) -> None:
    """Make manifest.json agree with a file that was changed."""
    manifest, data = bundle / "manifest.json", (bundle / name).read_bytes()
    content = json.loads(manifest.read_text())
    content["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    manifest.write_text(json.dumps(content))
