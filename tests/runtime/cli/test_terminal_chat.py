"""A conversation in the terminal, line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moevlm.runtime.cli.terminal_chat import TerminalChat
from moevlm.runtime.core.errors import RequestError


class Terminal:
    """Types lines, and keeps what was said and what conversations were answered."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = [*lines, EOFError]
        self.said: list[str] = []
        self.asked: list[list[dict[str, Any]]] = []

    def read(self) -> str:
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    def answer(self, messages: list[dict[str, Any]]) -> str:
        self.asked.append(messages)
        match messages[-1]["content"]:
            case "too long" | [*_, {"text": "too long"}]:
                raise RequestError("the prompt is too long")
            case "stop":
                raise KeyboardInterrupt
        return f"answer {len(self.asked)}"

    def chat(self, system: str | None = None) -> Terminal:
        TerminalChat(self.answer, self.said.append, system).run(self.read)
        return self


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_every_message_carries_the_conversation_so_far() -> None:
    terminal = Terminal("one", "", "two").chat(system="be brief")
    system = {"role": "system", "content": "be brief"}
    assert terminal.asked == [
        [system, user("one")],
        [system, user("one"), assistant("answer 1"), user("two")],
    ]


def test_clear_forgets_all_but_the_system_message(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    terminal = Terminal("one", f"/image {tmp_path / 'a.png'}", "/clear", "two").chat(system="s")
    assert terminal.asked[1] == [{"role": "system", "content": "s"}, user("two")]


def test_images_go_with_the_next_message_and_no_further(tmp_path: Path) -> None:
    for name in ("a b.png", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    terminal = Terminal(f"/image {tmp_path}/a b.png", f"/image {tmp_path}/c.png", "what?", "and?").chat()
    first = terminal.asked[0][0]["content"]
    assert first == [
        {"type": "image", "image": tmp_path / "a b.png"},
        {"type": "image", "image": tmp_path / "c.png"},
        {"type": "text", "text": "what?"},
    ]
    assert terminal.asked[1][-1] == user("and?")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image absent.png", "error: image 'absent.png' does not exist"),
        (f"/image {'a' * 300}.png", "error: image 'aaa"),
        ("/image ~nobody-has-this-name/a.png", "error: image '~nobody"),
        ("/image", "error: which image?"),
        ("/nonsense", "error: unknown command"),
        ("too long", "error: the prompt is too long"),
    ],
    ids=lambda text: text[:20],
)
def test_a_mistake_is_said_and_forgotten(line: str, said: str) -> None:
    terminal = Terminal(line, "one").chat()
    assert terminal.said[0].startswith(said)
    assert terminal.asked[-1] == [user("one")]


def test_images_of_a_refused_message_are_not_in_the_way_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    terminal = Terminal("one", f"/image {tmp_path / 'a.png'}", "too long", "two").chat()
    assert terminal.said[-1] == "error: the prompt is too long (the message and its images are forgotten)"
    assert terminal.asked[-1] == [user("one"), assistant("answer 1"), user("two")]


def test_an_interrupted_answer_is_forgotten_and_an_interrupt_at_the_prompt_does_not_leave() -> None:
    terminal = Terminal("stop", KeyboardInterrupt, "one").chat()
    assert terminal.asked[-1] == [user("one")]
    assert len(terminal.said) == 2


def test_exit_leaves_and_a_path_is_no_command() -> None:
    terminal = Terminal("/usr/bin is a folder", "/help", "/exit", "never").chat()
    assert [messages[-1] for messages in terminal.asked] == [user("/usr/bin is a folder")]
    assert "/image FILE" in terminal.said[0]


def test_an_image_that_will_be_refused_is_refused_when_it_is_added(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")

    def refuse(messages: list[dict[str, Any]]) -> None:
        assert messages[0]["content"][0] == {"type": "image", "image": tmp_path / "a.png"}
        raise RequestError("mixtral takes text alone")

    terminal = Terminal(f"/image {tmp_path / 'a.png'}", "one")
    TerminalChat(terminal.answer, terminal.said.append, check=refuse).run(terminal.read)
    assert terminal.said == ["error: mixtral takes text alone"]
    assert terminal.asked == [[user("one")]]
