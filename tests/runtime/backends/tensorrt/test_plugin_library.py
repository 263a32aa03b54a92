"""The plugin library is the one that was installed."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from moevlm.runtime.backends.tensorrt import plugin_library
from moevlm.runtime.core.errors import EngineError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library of an installation whose RECORD lists it."""
    library = tmp_path / "moevlm" / "runtime" / "tensorrt_plugin.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"the plugins")
    info = tmp_path / "moevlm-0.dist-info"
    info.mkdir()
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"the plugins").digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"moevlm/runtime/tensorrt_plugin.so,sha256={digest},11\nmoevlm-0.dist-info/RECORD,,\n")
    monkeypatch.setattr(plugin_library, "plugin_path", lambda: library)
    monkeypatch.setattr(plugin_library, "distribution", lambda _: PathDistribution(info))
    return library


def test_a_library_as_it_was_installed_is_taken(installed) -> None:
    assert plugin_library.checked_plugin_path() == installed


def test_a_library_that_was_changed_is_refused(installed) -> None:
    installed.write_bytes(b"the pluginS")
    with pytest.raises(EngineError, match=r"tensorrt_plugin.so was changed after it was installed: its sha256 is"):
        plugin_library.checked_plugin_path()


def test_a_library_that_no_record_lists_is_taken(installed) -> None:
    (installed.parents[2] / "moevlm-0.dist-info" / "RECORD").write_text("moevlm-0.dist-info/RECORD,,\n")
    installed.write_bytes(b"built in place")
    assert plugin_library.checked_plugin_path() == installed
