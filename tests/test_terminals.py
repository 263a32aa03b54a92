"""Commands under odd locales, paths, closed and full streams, and signals: one line at most, never a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.printable import MOST_CHARACTERS, message_line, printable
from tests.support.bundles import copy_bundle, edit_manifest
from tests.support.command_line import COMMAND, assert_refused, call, environment

LOCALES: dict[str, dict[str, str]] = {
    "C": {"LC_ALL": "C"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
}
NAMES = {"not UTF-8": b"b\xff\xfe.moevlm", "Chinese": "天 é.moevlm".encode()}
RUN = ("--max-new-tokens", "3", "--prompt", "天")


def moevlm(*arguments: str | bytes | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    variables = environment() | options.pop("variables", {})  # type: ignore[operator]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, "env": variables} | options
    return subprocess.run([os.fsencode(COMMAND), *map(os.fsencode, arguments)], **options)  # type: ignore[call-overload]


def assert_calm(done: subprocess.CompletedProcess[bytes], statuses: tuple[int, ...]) -> None:
    err = done.stderr or b""
    assert done.returncode in statuses, err
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
    assert sum(line.startswith(b"error: ") for line in err.splitlines()) == (done.returncode == 2)


@pytest.fixture(scope="module", params=NAMES.values(), ids=NAMES)
def named(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bundle under a name that not every terminal can show."""
    path = os.fsencode(tmp_path_factory.mktemp("named")) + b"/" + request.param
    os.rename(copy_bundle(tiny_bundle, tmp_path_factory.mktemp("copy")), path)  # noqa: PTH104 - bytes
    return path


@pytest.mark.parametrize("locale", LOCALES.values(), ids=LOCALES)
def test_any_path_and_any_text_under_any_locale(locale: dict[str, str], named: bytes) -> None:
    for command in (("run", named, *RUN, "--json"), ("inspect", named), ("inspect", named, "--json")):
        done = moevlm(*command, variables=locale)
        assert_calm(done, (0,))
        if command[-1] == "--json":
            assert json.loads(done.stdout)
    assert_calm(moevlm("run", named, "--prompt", b"\xff", variables=locale), (2,))
    missing = moevlm("inspect", named + b".missing", variables=locale)
    assert_calm(missing, (2,))
    assert len(missing.stderr.splitlines()) == 1


def test_an_answer_that_the_encoding_lacks_is_escaped(tiny_bundle: Path) -> None:
    code = "import sys, moevlm.runtime.core.printable as p; p.escape_unencodable(sys.stdout); print('天 ok')"
    variables = environment() | {"PYTHONIOENCODING": "latin-1"}
    shown = subprocess.run([COMMAND.with_name("python"), "-c", code], env=variables, capture_output=True, check=True)
    assert shown.stdout == b"\\u5929 ok\n"
    for encoding in ("latin-1", "ascii"):
        assert_calm(moevlm("run", tiny_bundle, *RUN, variables={"PYTHONIOENCODING": encoding}), (0,))


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_is_no_traceback(closed: int, tiny_bundle: Path) -> None:
    for command in (("run", tiny_bundle, *RUN), ("run", tiny_bundle, "--prompt", "-"), ("inspect", tiny_bundle)):
        words = [str(word) for word in (COMMAND, *command)]
        line = '"$@" ' + ("<&-" if closed == 0 else f"{closed}>&-")
        done = subprocess.run(
            ["sh", "-c", line, "sh", *words], env=environment(), capture_output=True, input=None, timeout=120
        )
        assert done.returncode in (0, 1, 2), done.stderr
        assert b"Traceback" not in done.stderr
        if closed == 0 and "-" in words:
            assert done.stderr == b"error: standard input is closed: nothing can be read from it\n"


def test_a_build_with_closed_streams_writes_a_whole_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = [str(word) for word in (COMMAND, "build", tiny_checkpoint, "-o", tmp_path / "b", "--target", "ort-cpu")]
    subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *words], env=environment(), check=True, timeout=120)
    Bundle.open(tmp_path / "b").verify()


def test_messages_from_a_closed_standard_input(tiny_bundle: Path) -> None:
    words = [str(word) for word in (COMMAND, "run", tiny_bundle, "--messages", "-")]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *words], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [("inspect", "--json"), ("inspect",), ("run", *RUN), ("run", *RUN, "--json")])
def test_a_full_disk_and_a_reader_that_leaves(command: tuple[str, ...], tiny_bundle: Path) -> None:
    words = (command[0], tiny_bundle, *command[1:])
    with Path("/dev/full").open("wb") as full:
        done = moevlm(*words, stdout=full)
    assert_calm(done, (2,))
    assert b"No space left on device" in done.stderr
    read, write = os.pipe()
    os.close(read)
    try:
        assert_calm(moevlm(*words, stdout=write), (1,))
    finally:
        os.close(write)


MOMENTS = {
    # By then nothing but Python itself has run.
    "first": lambda proc: int(re.search(r"SigCgt:\s*(\w+)", (proc / "status").read_text())[1], 16) & 1,
    "importing": lambda proc: "_multiarray_umath" in (proc / "maps").read_text(),
    "loading": lambda proc: "onnxruntime_pybind11_state" in (proc / "maps").read_text(),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_time_is_its_own_status(number: signal.Signals, moment: str, tiny_bundle: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "run", tiny_bundle, "--prompt", "Hi", "--max-new-tokens", "400"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs with &
    )
    while process.poll() is None and not MOMENTS[moment](Path(f"/proc/{process.pid}")):
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.strip() == (b"interrupted" if number == signal.SIGINT else b"")


ODD = "\x1b]0;pwned\x07\x1b[31m\x85\u202ex\r"


def test_control_characters_of_a_bundle_are_never_printed(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    edit_manifest(bundle, lambda m: (m["model"].update(model_type=f"a{ODD}b"), m["tools"].update({ODD: ODD})))
    shown = call("inspect", bundle)
    assert shown.status == 0
    assert f"a{printable(ODD)}b" in shown.out
    for text in (shown.out, call("inspect", bundle, "--json").out):
        assert not set(text) & set("\x1b\x07\r\x85\u202e")
    edit_manifest(bundle, lambda m: m["engines"].update({ODD: m["engines"]["ort-cpu"] | {"operators": ODD}}))
    refused = call("run", bundle, "--prompt", "Hi", "--target", ODD)
    assert_refused(refused, "needs operators of", "\\x1b")
    edit_manifest(bundle, lambda m: m.update({f"{ODD}{'x' * 10**6}": 1}))
    refused = call("inspect", bundle)
    assert_refused(refused, "manifest.json", "characters ...]")
    assert not set(refused.err) & set("\x1b\x07\r\x85\u202e")
    assert len(refused.err) < MOST_CHARACTERS + 200


def test_printable_keeps_what_people_write() -> None:
    text = "天 é 👩‍🚀 عربى\ttab\nline"
    assert printable(text) == text
    assert message_line("a\nb\x1b") == "a b\\x1b"
