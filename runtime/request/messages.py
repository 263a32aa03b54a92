"""Messages of a request: every field checked by name, text for the template, images and videos for preprocessing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moevlm.runtime.core.errors import RefusedOption, RequestError, one_line, require_positive
from moevlm.runtime.request.image_limits import ImageLimits

Message = Mapping[str, Any]
ROLES = ("assistant", "system", "user")
MAX_CHARACTERS = 1 << 22  # of all texts of a request
_PART_FIELDS = {
    "image": ("type", "image", "min_pixels", "max_pixels"),
    "image_url": ("type", "image_url", "min_pixels", "max_pixels"),
    "text": ("type", "text"),
    "video": ("type", "video", "fps", "max_frames", "max_pixels"),
}


@dataclass(frozen=True)
class GivenImage:
    """An image of a request: what its part holds, or the bytes of its data: URI, and how large it may become."""

    source: Any
    limits: ImageLimits


@dataclass(frozen=True)
class GivenVideo:
    """A video of a request. fps: frames a second of a list of images, None for the reference's number.

    max_frames: the most that are taken, None for the model's number. limits: how large a frame may become.
    """

    source: Any
    fps: float | None
    max_frames: int | None
    limits: ImageLimits


def plain_messages(messages: Sequence[Message], most: int = MAX_CHARACTERS) -> list[dict[str, Any]]:
    """Checked copies of role and content that hold only str, list and dict; an image part becomes {"type": "image"}.

    A video part becomes {"type": "video"}.

    A template sees nothing else: no image objects, whose methods a sandbox cannot judge. most: messages and parts in
    all, counted before anything is copied.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise RefusedOption("messages", messages, "a list of {role, content}, not empty")
    _require_count(messages, most)
    room = MAX_CHARACTERS
    plain = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise RefusedOption(where, message, "an object with role and content")
        _require_fields(message, ("role", "content"), where)
        role = message.get("role")
        if not isinstance(role, str) or str.__str__(role) not in ROLES:
            raise RefusedOption(f"{where}.role", role, ", ".join(ROLES))
        content = _plain_content(message.get("content"), f"{where}.content")
        room -= sum(map(len, texts_of(content)))
        if room < 0:
            raise RequestError(f"the messages have more than {MAX_CHARACTERS} characters (the most that is allowed)")
        plain.append({"role": role.encode().decode(), "content": content})  # a subclass of str becomes str
    return plain


def texts_of(content: str | list[dict[str, str]]) -> list[str]:
    """The texts of a plain message's content."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def texts_alone(plain: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain messages with a string each: templates of models of text alone know no parts."""
    return [{**message, "content": "".join(texts_of(message["content"]))} for message in plain]


def require_no_video(plain: Sequence[Mapping[str, Any]], images: bool) -> None:
    """Raise RequestError for a video part, as for any kind of part that the model does not take.

    images: whether it takes those.
    """
    taken = [kind for kind in _PART_FIELDS if kind == "text" or (images and kind != "video")]
    for i, message in enumerate(plain):
        for j, part in enumerate(message["content"] if isinstance(message["content"], list) else ()):
            if part["type"] == "video":
                raise RefusedOption(f"messages[{i}].content[{j}].type", "video", ", ".join(taken))


def visuals_of(messages: Sequence[Message]) -> list[GivenImage | GivenVideo]:
    """Images and videos in the order of their placeholders.

    messages: checked by `plain_messages`. A URL must be a data: URI. Nothing is fetched, and no text from a URL is
    ever taken for a file's name. A detail of "low" allows an image the pixels of 512 x 512; "high" and "auto" change
    nothing.
    """
    visuals: list[GivenImage | GivenVideo] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            where = f"messages[{i}].content[{j}]"
            if part["type"] == "text":
                continue
            if part["type"] == "video":
                visuals.append(_video(part, where))
                continue
            low = False
            if part["type"] == "image":
                source = part.get("image")
                if source is None:
                    raise RequestError(f"{where}.image is missing")
            else:
                source, low = _data_uri(part.get("image_url"), f"{where}.image_url")
            limits = ImageLimits(part.get("min_pixels"), part.get("max_pixels"), low_detail=low)
            visuals.append(GivenImage(source, limits))
    return visuals


def _video(part: Mapping[str, Any], where: str) -> GivenVideo:
    fps, frames = part.get("fps"), part.get("max_frames")
    if part.get("video") is None:
        raise RequestError(f"{where}.video is missing")
    if fps is not None and not (isinstance(fps, (int, float)) and not isinstance(fps, bool) and 1e-3 <= fps <= 1e4):
        raise RefusedOption(f"{where}.fps", fps, "a number from 0.001 to 10000")
    if frames is not None:
        require_positive(f"{where}.max_frames", frames)
    return GivenVideo(part["video"], fps, frames, ImageLimits(max_pixels=part.get("max_pixels")))


def _require_count(messages: Sequence[Message], most: int) -> None:
    count = len(messages)
    for message in messages if count <= most else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, (list, tuple)):
            count += len(content)
    if count > most:
        raise RequestError(f"the request has {count} messages and parts (at most {most} fit into the context)")


def _require_fields(value: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for name in value:
        if name not in known:
            raise RequestError(f"unsupported field {where}.{one_line(name, 60)} (allowed: {', '.join(sorted(known))})")


def _plain_content(content: object, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return _plain_text(content, where)
    if not isinstance(content, (list, tuple)):
        raise RefusedOption(where, content, "text, or a list of parts")
    parts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in _PART_FIELDS:
            raise RefusedOption(f"{where}[{j}].type", kind, ", ".join(_PART_FIELDS))
        _require_fields(part, _PART_FIELDS[kind], f"{where}[{j}]")
        if kind == "text":
            parts.append({"type": "text", "text": _plain_text(part.get("text"), f"{where}[{j}].text")})
        else:
            parts.append({"type": "video" if kind == "video" else "image"})
    return parts


def _plain_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise RefusedOption(where, text, "text")
    try:
        return text.encode().decode()  # also turns a subclass of str into str
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is not Unicode text: lone surrogate at character {error.start}") from error


def _data_uri(value: object, where: str) -> tuple[bytes, bool]:
    """The bytes, and whether few details are enough."""
    if isinstance(value, Mapping):
        _require_fields(value, ("url", "detail"), where)
    url = value.get("url") if isinstance(value, Mapping) else value
    detail = value.get("detail") if isinstance(value, Mapping) else None
    if not isinstance(url, str):
        raise RequestError(f"{where}.url is missing")
    if detail is not None and not (isinstance(detail, str) and detail in ("low", "high", "auto")):
        raise RefusedOption(f"{where}.detail", detail, "auto, high, low")
    head, comma, body = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise RefusedOption(f"{where}.url", url, "data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True), detail == "low"
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}.url is not base64: {one_line(error)}") from error
