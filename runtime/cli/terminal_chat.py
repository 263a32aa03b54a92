"""A conversation in the terminal: a line is a message, and a line that begins with / is a command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moevlm.runtime.core.errors import RequestError, shown

HELP = """\
/image FILE   add an image to the next message; several are allowed
/clear        forget the conversation and the images not yet sent
/help         show this
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer"""

Message = dict[str, Any]


class TerminalChat:
    """The messages so far, and what a typed line does to them."""

    def __init__(
        self,
        answer: Callable[[list[Message]], str],
        say: Callable[[str], None],
        system: str | None = None,
        check: Callable[[list[Message]], object] = lambda _: None,
    ) -> None:
        """answer: prints the reply to a conversation while it is made, and returns it. say: prints a line.

        check: raises RequestError for a conversation that will be refused; an image is held to it when it is added.
        """
        self._answer, self._say, self._check = answer, say, check
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first)
        self._images: list[Path] = []

    def add_image(self, path: Path) -> None:
        """To the next message. Raises RequestError for what is no file, and for an image that is refused."""
        if not path.name:
            raise RequestError("which image? /image FILE")
        if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            raise RequestError(f"image {shown(str(path))} does not exist or is no file")
        self._check([_user_message([path], "?")])
        self._images.append(path)

    def run(self, read: Callable[[], str]) -> None:
        """Until `read` raises EOFError, or /exit. A mistake is said, and the conversation goes on."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /exit leaves)")
                continue
            if line == "/exit":
                return
            try:
                self._take(line)
            except RequestError as error:
                self._say(f"error: {error}")

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/image":
                self.add_image(Path(os.path.expanduser(rest.strip())))  # noqa: PTH111 - Path.expanduser raises
                self._say(f"{len(self._images)} image{'s' * (len(self._images) > 1)} for the next message")
            case "/clear":
                self._messages, self._images = list(self._first), []
                self._say("the conversation begins anew")
            case "/help":
                self._say(HELP)
            case _ if command.startswith("/") and "/" not in command[1:]:
                raise RequestError(f"unknown command {command} (/help lists them)")
            case _:
                self._send(line)

    def _send(self, text: str) -> None:
        """A message that is refused, or whose answer is interrupted, is not part of the conversation.

        Images of a refused one are dropped: one of them may be why, and would be in the way of the next message, too.
        """
        messages = [*self._messages, _user_message(self._images, text)]
        try:
            reply = self._answer(messages)
        except KeyboardInterrupt:
            self._say("\n(stopped; the message and what there was of the answer are forgotten)")
            return
        except RequestError as error:
            if not self._images:
                raise
            self._images = []
            raise RequestError(f"{error} (the message and its images are forgotten)") from None
        self._messages = [*messages, {"role": "assistant", "content": reply}]
        self._images = []


def _user_message(images: list[Path], text: str) -> Message:
    parts = [*({"type": "image", "image": path} for path in images), {"type": "text", "text": text}]
    return {"role": "user", "content": parts if images else text}
