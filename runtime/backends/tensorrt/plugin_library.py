"""The library of this package's TensorRT plugins: where it lies, and that it is the one that was installed."""

import base64
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from moevlm.runtime.backends.libraries import plugin_path
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.installation import install_command


def checked_plugin_path() -> Path:
    """The library, its hash compared with the one that the installation recorded, if it did.

    An editable installation records none: there the library is as trustworthy as the sources beside it.
    Raises EngineError if the library is not there or is not the recorded one.
    """
    path = plugin_path()
    recorded = _recorded_sha256(path)
    if recorded is not None:
        digest = hashlib.sha256(path.read_bytes()).digest()
        found = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()  # as RECORD writes it
        if found != recorded:
            raise EngineError(
                f"{path} was changed after it was installed: its sha256 is {found}, RECORD says {recorded} "
                f"({install_command()})"
            )
    return path


def _recorded_sha256(path: Path) -> str | None:
    try:
        files = distribution("moevlm").files or ()
    except PackageNotFoundError:
        return None
    for file in files:
        if file.name == path.name and Path(str(file.locate())).resolve() == path.resolve():
            return file.hash.value if file.hash is not None and file.hash.mode == "sha256" else None
    return None
