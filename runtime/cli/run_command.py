"""`moevlm run`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moevlm.runtime.cli.command_line import (
    CACHE_MEMORY,
    EXPERTS_IN,
    SPINNING,
    THREADS,
    complete_target,
)
from moevlm.runtime.cli.option_types import InputFile, Number, Size, WholeNumber
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import refusal
from moevlm.runtime.core.experts_in import DEVICE

if TYPE_CHECKING:
    from moevlm.runtime.cli.answer_printer import AnswerPrinter


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text of the user's message; - reads it from standard input.")
@click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Image file to put before the text; repeatable.",
)
@click.option(
    "--video",
    "videos",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Video file to put before the text, behind images; repeatable.",
)
@click.option("--system", help="Text of a system message before it.")
@click.option(
    "--messages", metavar="FILE", type=InputFile(), help="JSON file with a whole conversation: [{role, content}, ...]."
)
@click.option(
    "--target",
    shell_complete=complete_target,
    help="Engine of the bundle to use.  [default: one for this GPU, else cpu; int8 before others]",
)
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=WholeNumber(),
    default=defaults.MAX_NEW_TOKENS,
    show_default=True,
    help="End the answer after N tokens.",
)
@click.option(
    "--temperature",
    metavar="X",
    type=Number(),
    help="Sampling temperature; 0 always takes the likeliest token.  [default: the model's, else 0]",
)
@click.option("--top-k", metavar="N", type=WholeNumber(), help="Sample among the N likeliest tokens.")
@click.option(
    "--top-p", metavar="X", type=Number(), help="Sample among the fewest tokens with a total probability of X."
)
@click.option("--min-p", metavar="X", type=Number(), help="Drop tokens less likely than X times the likeliest.")
@click.option(
    "--repetition-penalty", metavar="X", type=Number(), help="Divide the logits of tokens that already occurred by X."
)
@click.option(
    "--seed", metavar="N", type=WholeNumber(), help="Seed of the sampling: the same seed gives the same text."
)
@click.option("--stop", multiple=True, help="End the answer before this text; repeatable.")
@click.option(
    "--skip-special-tokens/--no-skip-special-tokens",
    default=True,
    show_default=True,
    help="Leave special tokens, such as markers of thoughts, out of the text.",
)
@click.option(
    "--template-option",
    "template_options",
    metavar="NAME=VALUE",
    multiple=True,
    help="Set a variable of the chat template, such as enable_thinking=false; repeatable.",
)
@click.option(
    "--logprobs",
    metavar="N",
    type=WholeNumber(),
    help="With --json: report log-probabilities, and of N alternatives for each token.",
)
@click.option("--threads", metavar="N", type=WholeNumber(1), help=THREADS)
@click.option("--spinning/--no-spinning", default=True, show_default=True, help=SPINNING)
@click.option(
    "--chunk-tokens",
    metavar="N",
    type=WholeNumber(),
    help="Read at most N prompt tokens in one step.  [default: 512, on a GPU what the engine was built for]",
)
@click.option("--cache-memory", metavar="SIZE", type=Size(), help=CACHE_MEMORY)
@click.option("--experts-in", metavar="PLACE", default=DEVICE, help=EXPERTS_IN)
@click.option(
    "--max-image-megapixels",
    metavar="X",
    type=Number(),
    default=defaults.MAX_IMAGE_PIXELS / 1e6,
    show_default=True,
    help="Refuse images of more than X million pixels.",
)
@click.option(
    "--max-image-tokens",
    metavar="N",
    type=WholeNumber(),
    help="Make larger images smaller, to at most N tokens each.  [default: the checkpoint's own limit]",
)
@click.option("-v", "--verbose", is_flag=True, help="Show the engine, the number of tokens and tokens per second, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streamed text.")
def run(
    bundle: Path,
    prompt: str | None,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    system: str | None,
    messages: Any,
    template_options: tuple[str, ...],
    target: str | None,
    threads: int | None,
    spinning: bool,
    chunk_tokens: int | None,
    cache_memory: int | None,
    experts_in: str,
    max_image_megapixels: float,
    max_image_tokens: int | None,
    verbose: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer one prompt, the text streaming as it is made. Without one, on a terminal, hold a conversation."""
    from moevlm.runtime.backends.selection import select
    from moevlm.runtime.bundle.reader import Bundle
    from moevlm.runtime.cli.answer_printer import AnswerPrinter
    from moevlm.runtime.cli.background import Background
    from moevlm.runtime.cli.console import notice, print_json
    from moevlm.runtime.cli.run_options import conversation_of, require_taken, template_options_of
    from moevlm.runtime.cli.run_report import run_report
    from moevlm.runtime.core.reports import to_json
    from moevlm.runtime.load_options import LoadOptions
    from moevlm.runtime.loading import load_runtime
    from moevlm.runtime.request.generation_file import GENERATION, released_sampling
    from moevlm.runtime.request.prompt import Prompt
    from moevlm.runtime.request.prompt_builder import PromptBuilder
    from moevlm.runtime.request.sampling import NARROWING, SamplingOptions, SamplingParams

    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json: streamed text has no place for them")
    if verbose and as_json:
        raise click.UsageError("--verbose is for streamed text: --json has these numbers")
    at_a_terminal = sys.stdin is not None and sys.stdin.isatty()
    chatting = prompt is None and messages is None and not as_json and at_a_terminal
    if max_image_tokens is not None and not (images or videos) and messages is None and not chatting:
        raise click.UsageError("--max-image-tokens needs an image: --image FILE")
    if chatting and videos:
        raise click.UsageError("--video needs --prompt: a conversation in the terminal takes images only")
    pixels = _pixels(max_image_megapixels)
    SamplingParams(**sampling | {"temperature": sampling["temperature"] or 1})  # before anything is opened
    options = template_options_of(template_options)
    conversation = [] if chatting else conversation_of(prompt, images, videos, system, messages)
    opened = Bundle.open(bundle)
    require_taken(opened.manifest.model, images, videos)
    released = released_sampling(opened.optional_text(GENERATION))
    if (released.temperature if sampling["temperature"] is None else sampling["temperature"]) == 0:
        for name in (*NARROWING, "seed"):
            if sampling[name] is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --temperature above 0: 0 is greedy")
    params = released.updated(SamplingOptions(**sampling))  # type: ignore[typeddict-item]
    name, _ = select(opened, target)
    loading = LoadOptions(threads, spinning, chunk_tokens, pixels, cache_memory=cache_memory, experts_in=experts_in)
    ready: list[Prompt] = []

    def first(prompts: PromptBuilder) -> None:
        """Refuse what can be refused before weights are read."""
        asked = conversation_of("?", images, (), system, None) if chatting else conversation
        ready.append(prompts.build(asked, options, max_image_tokens))

    with Background() as background:
        with notice() as show:
            runtime = background.call(partial(load_runtime, bundle, name, loading, show, first))
        with runtime:
            answer = AnswerPrinter(
                background, runtime, params, options, max_image_tokens, silent=as_json, verbose=verbose
            )
            if chatting:
                _chat(answer, system, images, name)
            else:
                pieces = answer(ready[0])
    if as_json:
        print_json(to_json(run_report(name, pieces, params.logprobs is not None)))


def _chat(answer: AnswerPrinter, system: str | None, images: tuple[Path, ...], target: str) -> None:
    """A conversation in the terminal, until Ctrl-D or /exit."""
    from contextlib import suppress

    from moevlm.runtime.cli.terminal_chat import TerminalChat
    from moevlm.runtime.core.printable import printable

    def say(line: str) -> None:
        click.echo(printable(line), err=True)

    with suppress(ImportError):  # not everywhere: lines are then typed without history
        import readline  # noqa: F401 - input() edits lines with it

    say(f"{target}; /help lists the commands, Ctrl-D leaves")

    def reply(messages: list[dict[str, Any]]) -> str:
        return "".join(piece.text for piece in answer(answer.prompt(messages)))

    chat = TerminalChat(reply, say, system, check=answer.prompt)
    for image in images:
        chat.add_image(image)
    chat.run(partial(input, ">>> "))
    say("")


def _pixels(megapixels: float) -> int:
    if not 0 < megapixels <= 10_000:  # NaN fails, too
        raise click.UsageError(refusal("--max-image-megapixels", megapixels, "a number above 0, up to 10000"))
    return max(1, int(megapixels * 1e6))
