"""From the options of `moevlm run` to a conversation, and to variables of the chat template."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from moevlm.runtime.core.errors import RequestError, refusal
from moevlm.runtime.core.manifest import ModelMetadata


def conversation_of(
    prompt: str | None, images: tuple[Path, ...], videos: tuple[Path, ...], system: str | None, messages: Any
) -> list[dict[str, Any]]:
    """Messages for Runtime.generate. Raises a usage error or RequestError for options that make none.

    prompt: "-" for standard input. messages: an open file of JSON, instead of all the others.
    """
    if messages is not None:
        if prompt is not None or images or videos or system is not None:
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
    shown = [(kind, path) for kind, paths in (("image", images), ("video", videos)) for path in paths]
    content = [*({"type": kind, kind: path} for kind, path in shown), {"type": "text", "text": text}]
    said = [{"role": "system", "content": _argument("--system", system)}] if system else []
    return [*said, {"role": "user", "content": content}]


def require_taken(model: ModelMetadata, images: tuple[Path, ...], videos: tuple[Path, ...]) -> None:
    """Raise RequestError, naming the option, for a kind of file that the model does not take."""
    if images and model.vision is None:
        raise RequestError(f"--image {images[0]}: {model.model_type} takes text alone")
    if videos and model.video is None:
        taken = "text alone" if model.vision is None else "no videos, but images"
        raise RequestError(f"--video {videos[0]}: {model.model_type} takes {taken}")


def _with_path(part: dict[str, Any]) -> dict[str, Any]:
    """An image part of the user's own file may name an image file, a video part a video file or images."""
    for kind in ("image", "video"):
        source = part.get(kind) if part.get("type") == kind else None
        if isinstance(source, str):
            return {**part, kind: Path(source)}
        if kind == "video" and isinstance(source, list):
            return {**part, kind: [Path(frame) if isinstance(frame, str) else frame for frame in source]}
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


def template_options_of(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse words NAME=VALUE; a value that is not JSON is text. Raises a usage error for other words."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise click.UsageError(refusal("--template-option", word, "NAME=VALUE"))
        if name in options:
            raise click.UsageError(f"--template-option {name} is given twice")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options
