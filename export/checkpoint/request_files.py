"""The bundle's files that turn requests into tokens and patches: read from the checkpoint, opened and tried."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from moevlm.export.checkpoint.end_tokens import end_tokens
from moevlm.export.checkpoint.files import optional_json
from moevlm.export.checkpoint.generation_config import GENERATION_CONFIG, sampling_defaults
from moevlm.export.checkpoint.side_files import (
    FoundPreprocessor,
    FoundTemplate,
    chat_template,
    preprocessor,
    video_preprocessor,
)
from moevlm.export.checkpoint.tokenizer_files import TokenizerFiles, tokenizer_files
from moevlm.runtime.core.errors import BundleError, CheckpointError, RequestError, shown
from moevlm.runtime.core.manifest import ImageMarks, ModelMetadata
from moevlm.runtime.request.chat import NOTHING, ChatTemplate
from moevlm.runtime.request.generation_file import GENERATION
from moevlm.runtime.request.images.fields import VIDEO_FILE
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.messages import texts_alone
from moevlm.runtime.request.tokenizer import Tokenizer
from moevlm.runtime.request.videos.registry import video_processor

_WORDS = "two plus three"
_PARTS: list[dict[str, Any]] = [{"type": "text", "text": _WORDS}]
_PICTURES: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
_TURNS = [
    {"role": "user", "content": [{"type": "image"}, *_PARTS]},
    {"role": "assistant", "content": [{"type": "text", "text": "five"}]},
    {"role": "user", "content": [*_PICTURES, *_PARTS]},
]
_VIDEO: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "video"}, *_PARTS]}]
_SYSTEM = [{"role": "system", "content": [{"type": "text", "text": "short answers"}]}]

# What tokenizer_config.json calls the tokens around an image.
_NAMED = {
    "image_marks.begin": ("boi_token", "start_image_token"),
    "image_marks.end": ("eoi_token", "end_image_token"),
}


@dataclass(frozen=True)
class RequestFiles:
    """files: of the bundle, by name. variables: what the chat template may use. notes: what the user should know.

    eos_token_ids: tokens that end an answer. image_marks: see `ModelMetadata`.
    """

    files: Mapping[str, bytes]
    variables: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    image_marks: ImageMarks
    notes: tuple[str, ...] = ()

    def lacking(self, model: ModelMetadata) -> Iterator[str]:
        """Notes on what the bundle will not take, as the checkpoint has no file for it."""
        absent = [name for name in ("tokenizer.json", "chat_template.jinja") if name not in self.files]
        if absent:
            needed = "them" if absent[1:] else "it"
            yield f"the checkpoint has no {' and no '.join(absent)}: moevlm run needs {needed}"
        if model.vision is not None and "preprocessor.json" not in self.files:
            yield "the checkpoint has no preprocessor_config.json: this bundle takes no images"
        elif model.video is not None and VIDEO_FILE not in self.files:
            yield "the checkpoint has no video preprocessing that could be used: this bundle takes no videos"


def request_files(
    directory: Path, model: ModelMetadata, mark_texts: Mapping[str, str] = NOTHING, pattern: str = ""
) -> RequestFiles:
    """Read what the checkpoint says of requests and of sampling; what it has not, the bundle lacks.

    model: metadata out of config.json. mark_texts: see `ModelConfig`. pattern: see `tokenizer_files`. Raises
    CheckpointError for a file that cannot be read, is not what it should be, or does not go with `model`: what a
    request would run into is found here.
    """
    tokens, template, images = tokenizer_files(directory, pattern), chat_template(directory), preprocessor(directory)
    generation = optional_json(directory, GENERATION_CONFIG)
    sampling = sampling_defaults(generation)
    files, notes, variables = {}, list(sampling.notes), tokens.named if tokens else {}
    tokenizer = None
    if tokens:
        tokenizer = _tokenizer(tokens, model)
        marks = {mark: (_mark_id(tokenizer, text),) for mark, text in mark_texts.items()}
        model = msgspec.structs.replace(model, image_marks=msgspec.structs.replace(model.image_marks, **marks))
        _check_marks(tokens, tokenizer, model)
        if tokens.note:
            notes.append(tokens.note)
    named = variables.get("eos_token")
    of_tokenizer = tokenizer.added.get(named) if tokenizer and named else None
    ends = end_tokens(generation, model, of_tokenizer, tokenizer is not None)
    if ends.note:
        notes.append(ends.note)
    if tokens:
        files["tokenizer.json"] = tokens.text.encode()
    if images and model.vision is None:
        notes.append(f"{images.file} has no part in a model of text alone")
        images = None
    if images:
        processor = _processor(images, model)
        files["preprocessor.json"] = json.dumps(images.fields, indent=1).encode()
        if model.video is not None and (videos := video_preprocessor(directory)):
            try:
                video_processor(videos.fields, model.tower, processor)
                files[VIDEO_FILE] = json.dumps(videos.fields, indent=1).encode()
            except BundleError as error:
                notes.append(f"video preprocessing is not used: {videos.file}: {error}")
    if template:
        opened = _opened(template, variables)
        files["chat_template.jinja"] = template.text.encode()
        if template.others:
            notes.append(f"of the chat templates the default is taken, not {', '.join(template.others)}")
        if tokenizer:
            notes += _try(template, opened, tokenizer, model, images is not None, VIDEO_FILE in files)
    if sampling.fields:
        files[GENERATION] = json.dumps(dict(sampling.fields), indent=1).encode()
    return RequestFiles(files, variables, ends.ids, model.image_marks, tuple(notes))


def image_patches(directory: Path, model: ModelMetadata) -> int | None:
    """The most patches that the checkpoint's preprocessing makes of an image; None if it has no preprocessing.

    Raises CheckpointError for a file that cannot be read, or does not go with `model`.
    """
    found = None if model.vision is None else preprocessor(directory)
    return None if found is None else _processor(found, model).max_patches


def _tokenizer(found: TokenizerFiles, model: ModelMetadata) -> Tokenizer:
    try:
        tokenizer = Tokenizer(found.text)
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    largest = tokenizer.largest_id
    if largest >= model.vocabulary:
        raise CheckpointError(
            f"tokenizer.json has token ids up to {largest}, with the tokens of the files beside it "
            f"(allowed: up to {model.vocabulary - 1}, for config.json says vocab_size = {model.vocabulary})"
        )
    if model.image_token_id is None:
        return tokenizer
    visual = tokenizer.token(model.image_token_id)
    if visual is None or tokenizer.added.get(visual) != model.image_token_id:
        raise CheckpointError(
            f"tokenizer.json has no added token for image_token_id = {model.image_token_id} of config.json "
            f"(to it that id is {shown(visual)})"
        )
    return tokenizer


def _mark_id(tokenizer: Tokenizer, text: str) -> int:
    if text not in tokenizer.added:
        raise CheckpointError(f"tokenizer.json has no added token {shown(text)}, which images of this model have")
    return tokenizer.added[text]


def _check_marks(found: TokenizerFiles, tokenizer: Tokenizer, model: ModelMetadata) -> None:
    """The tokens of images: the reference writes their text and reads it again, the runtime their ids."""
    marks = {f"image_marks.{mark}": ids for mark, ids in msgspec.structs.asdict(model.image_marks).items()}
    placeholder = "image_marks.placeholder" if model.image_marks.placeholder else "image_token_id"
    names = {placeholder: ("image_token",), **_NAMED}
    image = () if model.image_token_id is None else (model.image_token_id,)
    for field, ids in {"image_token_id": image, **marks}.items():
        texts = [tokenizer.token(token_id) for token_id in ids]
        for token_id, text in zip(ids, texts, strict=True):
            if text is None or tokenizer.added.get(text) != token_id:
                raise CheckpointError(f"tokenizer.json has no added token for {field} = {token_id}")
        for name in names.get(field, ()):
            if ids and (named := found.named.get(name)) is not None and [named] != texts:
                raise CheckpointError(
                    f"tokenizer_config.json says {name} = {shown(named)}, but {field} = {ids[0]} is {shown(texts[0])}"
                )


def _processor(found: FoundPreprocessor, model: ModelMetadata) -> ImageProcessor:
    try:
        return image_processor(found.fields, model.tower)
    except BundleError as error:
        raise CheckpointError(f"{found.file} does not go with the model: {error}") from error


def _opened(template: FoundTemplate, variables: Mapping[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate(template.text, variables)
    except BundleError as error:
        raise CheckpointError(f"the chat template of {template.file} cannot be used: {error}") from error


def _try(
    template: FoundTemplate,
    opened: ChatTemplate,
    tokenizer: Tokenizer,
    model: ModelMetadata,
    images: bool,
    videos: bool,
) -> Iterator[str]:
    """Render conversations of each kind; yields what the template refuses. Raises CheckpointError if it cannot work.

    A template may refuse system messages. It must render a user's question, and write one placeholder for each image.
    """
    for name, messages, refusable in _samples(images):
        try:
            text = opened.render(texts_alone(messages) if model.vision is None else messages)
        except BundleError as error:
            raise CheckpointError(f"the chat template of {template.file} cannot be used: {error}") from error
        except RequestError as error:
            if not refusable:
                raise CheckpointError(f"the chat template of {template.file} cannot be used: {error}") from error
            yield f"the chat template takes no {name}: {error}"
            continue
        if _WORDS not in text:
            raise CheckpointError(f"the chat template of {template.file} leaves out the user's text, of {name}")
        expected = sum(part["type"] == "image" for message in messages for part in message["content"])
        if (placeholder := model.image_placeholder) is None:
            continue
        found = tokenizer.encode(text).count(placeholder)
        if found != expected:
            raise CheckpointError(
                f"the chat template of {template.file} writes {found} image placeholders for the {expected} images of "
                f"{name} (allowed: one {tokenizer.token(placeholder)} for each)"
            )
    if videos and model.video is not None:
        try:
            found = tokenizer.encode(opened.render(_VIDEO)).count(model.video.placeholder)
        except RequestError:
            found = 0
        if found != 1:
            yield f"no videos: the chat template of {template.file} writes {found} placeholders for one"


def _samples(images: bool) -> Iterator[tuple[str, list[dict[str, Any]], bool]]:
    """(name, messages, whether a template may refuse them)."""
    question = [{"role": "user", "content": _PARTS}]
    yield "a question", question, False
    yield "system messages", [*_SYSTEM, *question], True
    if images:
        yield "a question about two images", [{"role": "user", "content": [*_PICTURES, *_PARTS]}], False
        yield "several turns", _TURNS, True
        yield "system messages before several turns", [*_SYSTEM, *_TURNS], True
