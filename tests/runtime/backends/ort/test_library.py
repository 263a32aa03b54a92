"""ONNX Runtime as our processes load it: nothing is written outside of the bundle, nobody is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moevlm.runtime.backends.ort.library import TELEMETRY, onnxruntime
from moevlm.runtime.core.errors import EngineError
from tests.support.command_line import COMMAND, environment

LOAD = """
import sys
import moevlm.runtime
runtime = moevlm.runtime.load(sys.argv[1])
print(*runtime.generate([{"role": "user", "content": "Hi"}], max_new_tokens=2))
"""
COMMANDS = {
    "command": [COMMAND, "run", "--max-new-tokens", "2", "--prompt", "Hi"],
    "library": [sys.executable, "-c", LOAD],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_loading_a_bundle_writes_no_file_anywhere(command: list[str | Path], tiny_bundle: Path, tmp_path: Path) -> None:
    homes = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")}
    for folder in homes.values():
        Path(folder).mkdir()
    before = {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")}
    variables = {name: value for name, value in environment().items() if name != TELEMETRY}
    done = subprocess.run([*command, tiny_bundle], env=variables | homes, cwd=homes["HOME"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    assert {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")} == before


@pytest.mark.parametrize(("theirs", "ours"), [(None, "1"), ("0", "0")])
def test_a_setting_of_the_user_s_stays(theirs: str | None, ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TELEMETRY, theirs or "")
    if theirs is None:
        monkeypatch.delenv(TELEMETRY)
    onnxruntime()
    assert os.environ[TELEMETRY] == ours


def test_a_library_that_does_not_load_is_told_from_one_that_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"onnxruntime does not load here: libfoo\.so\.1"):
        onnxruntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="needs onnxruntime"):
        onnxruntime()
