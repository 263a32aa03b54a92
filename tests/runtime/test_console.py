import io

import pytest
from rich.console import Console

from moevlm.runtime import console as module
from moevlm.runtime.console import bytes_text, table


def test_a_slow_load_shows_a_notice_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "_NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(module, "console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    with module.notice() as show:
        show("verifying", 1, 2)
        while "verifying" not in screen.getvalue():
            pass
    assert screen.getvalue().rstrip().endswith("\x1b[2K")  # wiped


def test_a_load_into_a_pipe_shows_no_notice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(module, "_NOTICE_SECONDS", 0.0)
    with module.notice() as show:
        show("verifying", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_tables_align_numbers_on_the_right_and_never_wrap() -> None:
    rows = [("a", "1.5 MB", "x" * 100), ("bb", "-", "4 of 9, margin 2"), ("天", "12.5 MB", "")]
    assert table("title", ("name", "size", "note"), rows).splitlines() == [
        "title",
        "name     size  note",
        "a      1.5 MB  " + "x" * 100,
        "bb          -  4 of 9, margin 2",
        "天    12.5 MB",
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_911_392, "9.9 MB"), (4.3e9, "4.3 GB")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert bytes_text(int(count)) == text
