"""`moevlm run`."""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moevlm.runtime import defaults
from moevlm.runtime.command_line import InputFile, complete_target
from moevlm.runtime.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.manifest import VisionFacts


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="The user's text; - reads it from standard input.")
@click.option("--image", "images", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Repeatable.")
@click.option("--system", help="A system message.")
@click.option("--messages", metavar="FILE", type=InputFile(), help="A conversation as JSON: [{role, content}, ...].")
@click.option(
    "--target",
    shell_complete=complete_target,
    help="Which engine of the bundle.  [default: for the GPU, else cpu; int8 before others]",
)
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=int,
    default=defaults.MAX_NEW_TOKENS,
    show_default=True,
    help="The most for the answer.",
)
@click.option("--temperature", metavar="X", type=float, help="0 is greedy.  [default: the model's, else 0]")
@click.option("--top-k", metavar="N", type=int, help="Sample among the k likeliest tokens.")
@click.option("--top-p", metavar="X", type=float, help="Sample among the likeliest that hold this share.")
@click.option("--min-p", metavar="X", type=float, help="Drop tokens below this share of the likeliest.")
@click.option("--repetition-penalty", metavar="X", type=float, help="Above 1: tokens that occurred are less likely.")
@click.option("--seed", metavar="N", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="Text that ends the answer, left out; repeatable.")
@click.option(
    "--skip-special-tokens/--no-skip-special-tokens",
    default=True,
    show_default=True,
    help="Leave markers, such as those of thoughts, out of the text.",
)
@click.option(
    "--template-option",
    "template_options",
    metavar="NAME=VALUE",
    multiple=True,
    help="A variable of the chat template, such as enable_thinking=false; repeatable.",
)
@click.option("--logprobs", metavar="N", type=int, help="With --json: alternatives for each token.")
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Cores for one operator.  [default: all]")
@click.option("--spinning/--no-spinning", default=True, show_default=True, help="Threads wait awake.")
@click.option(
    "--chunk-tokens",
    metavar="N",
    type=int,
    default=defaults.CHUNK_TOKENS,
    show_default=True,
    help="Prompt tokens in one step.",
)
@click.option(
    "--max-image-megapixels",
    metavar="X",
    type=float,
    default=defaults.MAX_IMAGE_PIXELS / 1e6,
    show_default=True,
    help="Larger images are refused.",
)
@click.option(
    "--max-image-tokens",
    metavar="N",
    type=int,
    help="Larger images are made smaller.  [default: the checkpoint's own limit]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of streamed text.")
def run(
    bundle: Path,
    prompt: str | None,
    images: tuple[Path, ...],
    system: str | None,
    messages: Any,
    template_options: tuple[str, ...],
    target: str | None,
    threads: int | None,
    spinning: bool,
    chunk_tokens: int,
    max_image_megapixels: float,
    max_image_tokens: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer one prompt, the text streaming as it is made."""
    from moevlm.runtime.background import Background
    from moevlm.runtime.bundle import Bundle
    from moevlm.runtime.console import notice, print_json
    from moevlm.runtime.generation_file import bundle_sampling
    from moevlm.runtime.loading import load_runtime
    from moevlm.runtime.printable import printable
    from moevlm.runtime.sampling import SamplingOptions, SamplingParams
    from moevlm.runtime.selection import select

    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json: streamed text has no place for them")
    if max_image_tokens is not None and not images and messages is None:
        raise click.UsageError("--max-image-tokens needs an image: --image FILE")
    pixels = _pixels(max_image_megapixels)
    SamplingParams(**sampling | {"temperature": sampling["temperature"] or 1})  # before anything is opened
    options = _template_options(template_options)
    conversation = _conversation(prompt, images, system, messages)
    opened = Bundle.open(bundle)
    released = bundle_sampling(opened)
    if (released.temperature if sampling["temperature"] is None else sampling["temperature"]) == 0:
        for name in ("top_k", "top_p", "min_p", "seed"):
            if sampling[name] is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --temperature above 0: 0 is greedy")
    params = released.updated(SamplingOptions(**sampling))  # type: ignore[typeddict-item]
    name, _ = select(opened, target)
    pieces = []
    # A terminal would obey what the model writes; a file or a pipe gets it as it is.
    shown = printable if sys.stdout is not None and sys.stdout.isatty() else str
    with Background() as background:
        with notice() as show:
            load = partial(
                load_runtime,
                bundle,
                name,
                threads,
                spinning,
                chunk_tokens,
                pixels,
                lambda done, total: show("verifying", done, total) if done < total else show("loading", 0, 0),
            )
            runtime = background.call(load)
        with runtime:
            request = background.call(partial(runtime.prompt, conversation, options, max_image_tokens))
            answer = background.call(partial(runtime.generate, request, params=params))
            _tell_large_images(request.images, runtime.model.vision)
            del request  # and the images in it
            while (piece := background.call(partial(next, answer, None), answer.cancel)) is not None:
                pieces.append(piece)
                if not as_json:
                    click.echo(shown(piece.text), nl=False)  # and flushed
    if as_json:
        print_json(_run_report(name, pieces, params.logprobs is not None))
    else:
        click.echo()


def _tell_large_images(images: Sequence["Image"], vision: "VisionFacts") -> None:
    """On a terminal, before they are encoded: it may take long, and how to make it short."""
    from moevlm.runtime.console import console

    terminal = console(stderr=True)
    for number, image in enumerate(images, 1) if terminal.is_terminal else ():
        tokens = image.width * image.height // (vision.patch_size * vision.merge_size) ** 2
        if tokens > defaults.LARGE_IMAGE_TOKENS:
            size = f"{image.width} x {image.height} pixels, {tokens} tokens"
            terminal.print(f"image {number} is read at {size}; --max-image-tokens N makes it smaller")


def _template_options(words: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE, the value JSON, or a text that is none."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{word!r} (allowed: NAME=VALUE)", param_hint="--template-option")
        if name in options:
            raise click.BadParameter(f"{name} is given twice", param_hint="--template-option")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _pixels(megapixels: float) -> int:
    if not 0 < megapixels <= 10_000:  # NaN fails, too
        raise click.BadParameter(f"{megapixels} (allowed: above 0, up to 10000)", param_hint="--max-image-megapixels")
    return max(1, int(megapixels * 1e6))


def _conversation(
    prompt: str | None, images: tuple[Path, ...], system: str | None, messages: Any
) -> list[dict[str, Any]]:
    if messages is not None:
        if prompt is not None or images or system is not None:
            raise click.UsageError("--messages stands alone: it holds the prompt, the images and the system message")
        try:
            return json.load(messages, object_hook=_with_path)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"--messages is not valid JSON: {error}") from None
    if prompt is None:
        raise click.UsageError('say what to ask: --prompt "..." (and --image FILE), or --messages FILE')
    text = _standard_input() if prompt == "-" else _argument("--prompt", prompt)
    if not text.strip():
        raise RequestError("the prompt is empty")
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    said = [{"role": "system", "content": _argument("--system", system)}] if system else []
    return [*said, {"role": "user", "content": content}]


def _with_path(part: dict[str, Any]) -> dict[str, Any]:
    """An image part of the user's own file may name an image file."""
    if part.get("type") == "image" and isinstance(part.get("image"), str):
        return {**part, "image": Path(part["image"])}
    return part


def _argument(option: str, text: str) -> str:
    """Text of the command line, which is UTF-8 whatever the locale takes it for. Raises RequestError."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise RequestError(f"{option} is not UTF-8 text") from None


def _standard_input() -> str:
    if sys.stdin is None:
        raise RequestError("standard input is closed: nothing can be read from it")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")  # the newline is echo's, not the user's
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _run_report(target: str, pieces: list[Any], logprobs: bool) -> str:
    from moevlm.runtime.reports import RunReport, TokenReport, to_json

    usage = pieces[-1].usage
    sampled = [token for piece in pieces for token in piece.sampled]
    return to_json(
        RunReport(
            target=target,
            text="".join(piece.text for piece in pieces),
            token_ids=[token.token_id for token in sampled],
            finish_reason=pieces[-1].finish_reason,
            logprobs=[TokenReport(id=t.token_id, logprob=t.logprob, top=list(t.top)) for t in sampled]
            if logprobs
            else None,
            **vars(usage),
        )
    )
