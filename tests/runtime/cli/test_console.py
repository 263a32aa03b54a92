import io

import pytest
from rich.console import Console

from moevlm.runtime.cli import console as module
from moevlm.runtime.cli.console import amount_text, table
from moevlm.runtime.core.printable import bytes_text, count_text


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


def test_tables_align_numbers_on_the_right_and_never_wrap_in_a_pipe() -> None:
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


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (31_400, "31.4 thousand"), (4_900_000, "4.9 million"), (30.5e9, "30.5 billion")]
)
def test_counts_read_well(count: int, text: str) -> None:
    assert count_text(int(count)) == text


def test_amounts_are_bytes_with_a_rate_or_numbers_of_things() -> None:
    assert amount_text(3, 12) == "25% (3 of 12)"
    assert amount_text(1_200_000_000, 9_600_000_000, 350e6) == "12% (1.2 GB of 9.6 GB, 350.0 MB/s)"
    assert amount_text(5_000_000, 10_000_000) == "50% (5.0 MB of 10.0 MB)"


def test_a_bar_shows_percent_and_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    with module.progress_bar() as show:
        show("writing", 3_000_000, 12_000_000)
        while "25% (3.0 MB of 12.0 MB" not in screen.getvalue():
            pass


def test_without_a_terminal_a_long_stage_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = iter([0.0, 1.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    with module.progress_bar() as show:
        for done in (0, 1, 20, 21, 40):
            show("layers", done, 80)
    assert capsys.readouterr().err.splitlines() == [
        "layers",
        "layers: 25% (20 of 80), 60 s left",
        "layers: 50% (40 of 80), 40 s left",
    ]


def test_tables_too_wide_for_a_terminal_are_folded_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "console", lambda **_: Console(force_terminal=True, width=40))
    facts = [("layers", "2 of width 32; scaled rope, queries scaled by their place")]
    assert table("model", ("", ""), facts, header=False).splitlines() == [
        "model",
        "layers  2 of width 32; scaled rope,",
        "        queries scaled by their place",
    ]
    engines = [("cpu:int8", "138.1 kB", "-", "2026-11-27 17:17:07", "not checked")]
    assert table("engines", ("target", "size", "a token", "built", "parity"), engines).splitlines() == [
        "engines",
        "cpu:int8: size 138.1 kB, built",
        "  2026-11-27 17:17:07, parity",
        "  not checked",
    ]
