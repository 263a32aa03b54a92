"""Prints answers as they are made, for a command line that hears signals meanwhile."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from moevlm.runtime.core import defaults
from moevlm.runtime.core.printable import printable

if TYPE_CHECKING:
    from moevlm.runtime.cli.background import Background
    from moevlm.runtime.engine.answer import Piece
    from moevlm.runtime.engine.generate import Runtime
    from moevlm.runtime.request.prompt import Prompt
    from moevlm.runtime.request.sampling import SamplingParams


class AnswerPrinter:
    """Called with a prompt, it prints the answer and returns its pieces. An interrupt cancels the answer."""

    def __init__(
        self,
        background: Background,
        runtime: Runtime,
        params: SamplingParams,
        template_options: dict[str, Any],
        max_image_tokens: int | None = None,
        *,
        silent: bool = False,
        verbose: bool = False,
    ) -> None:
        """silent: print nothing. verbose: say on standard error what each answer cost."""
        self._background, self._runtime, self._params = background, runtime, params
        self._options, self._max_image_tokens = template_options, max_image_tokens
        self._silent, self._verbose = silent, verbose
        # A terminal would obey what the model writes; a file or a pipe gets it as it is.
        self._shown = printable if sys.stdout is not None and sys.stdout.isatty() else str

    def prompt(self, messages: list[dict[str, Any]]) -> Prompt:
        """Raises RequestError for a conversation that is refused."""
        return self._background.call(partial(self._runtime.prompt, messages, self._options, self._max_image_tokens))

    def __call__(self, prompt: Prompt) -> list[Piece]:
        """Raises RequestError for a prompt that is too long, EngineError for a step that fails."""
        pieces: list[Piece] = []
        _tell_large_images(prompt)
        with self._background.call(partial(self._runtime.generate, prompt, params=self._params)) as answer:
            while (piece := self._background.call(partial(next, answer, None), answer.cancel)) is not None:
                pieces.append(piece)
                if not self._silent:
                    click.echo(self._shown(piece.text), nl=False)  # and flushed
        if not self._silent:
            click.echo()
            self._say_how_it_went(pieces[-1])
        return pieces

    def _say_how_it_went(self, last: Piece) -> None:
        """On standard error: whether the answer was cut, where a person may read it, and what it cost."""
        usage, context = last.usage, self._runtime.context
        assert usage is not None  # the last piece has it
        if last.finish_reason == "length" and (self._verbose or (sys.stderr and sys.stderr.isatty())):
            full = usage.prompt_tokens + usage.new_tokens >= context
            limit = f"the context of {context} is full" if full else "--max-new-tokens"
            click.echo(f"note: the answer was cut after {usage.new_tokens} tokens ({limit})", err=True)
        if self._verbose:
            seconds = usage.vision_seconds + usage.prefill_seconds
            rate = f", {(usage.new_tokens - 1) / usage.decode_seconds:.1f} tokens/s" if usage.new_tokens > 1 else ""
            click.echo(
                f"{self._runtime.target}: {usage.prompt_tokens} prompt tokens, {usage.image_tokens} of them image, in "
                f"{seconds:.2f} s; {usage.new_tokens} new tokens{rate}",
                err=True,
            )


def _tell_large_images(prompt: Prompt) -> None:
    """On a terminal, before they are encoded: it may take long, and how to make it short."""
    from moevlm.runtime.cli.console import console

    terminal = console(stderr=True)
    if terminal.is_terminal and prompt.image_tokens > defaults.LARGE_IMAGE_TOKENS:
        terminal.print(f"images are read as {prompt.image_tokens} tokens; --max-image-tokens N makes each smaller")
