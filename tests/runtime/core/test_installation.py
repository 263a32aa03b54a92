"""The command that an error tells the user to type."""

from __future__ import annotations

import json

import pytest

from moevlm.runtime.core import installation
from moevlm.runtime.core.installation import install_command


@pytest.mark.parametrize(
    ("origin", "with_extra", "anew"),
    [
        (None, "pip install 'moevlm[cpu]'", "pip install --force-reinstall --no-deps 'moevlm'"),
        (
            {"url": "file:///a%20clone/moevlm", "dir_info": {"editable": True}},
            "pip install -e '/a clone/moevlm[cpu]'",
            "pip install --force-reinstall --no-deps -e '/a clone/moevlm'",
        ),
        (
            {"url": "file:///clone", "dir_info": {}},
            "pip install '/clone[cpu]'",
            "pip install --force-reinstall --no-deps '/clone'",
        ),
        (
            {"url": "file:///d/moevlm-1-py3-none-any.whl", "archive_info": {}},
            "pip install 'moevlm[cpu] @ file:///d/moevlm-1-py3-none-any.whl'",
            "pip install --force-reinstall --no-deps 'moevlm @ file:///d/moevlm-1-py3-none-any.whl'",
        ),
    ],
    ids=["index", "editable", "folder", "wheel"],
)
def test_command_installs_from_where_the_package_came(
    origin: dict | None, with_extra: str, anew: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(installation, "distributions", lambda **_: [Distribution()])
    assert install_command("cpu") == with_extra
    assert install_command() == anew


def test_without_an_installation_it_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "distributions", lambda **_: [])
    assert install_command("export") == "pip install 'moevlm[export]'"
