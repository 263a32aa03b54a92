"""Messages to prompts: the chat template's text in tokens, an image's or a video's own in each placeholder's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moevlm.runtime.core.errors import BundleError, RequestError, require_positive
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.printable import counted
from moevlm.runtime.request.chat import NOTHING, ChatTemplate
from moevlm.runtime.request.images.layout import ImageLayout
from moevlm.runtime.request.messages import (
    GivenImage,
    GivenVideo,
    Message,
    plain_messages,
    require_no_video,
    texts_alone,
    texts_of,
    visuals_of,
)
from moevlm.runtime.request.prompt import Prompt, require_room, require_tower, smaller_images
from moevlm.runtime.request.special_tokens import ControlGuard, control_tokens
from moevlm.runtime.request.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.request.images.processor import ImageProcessor
    from moevlm.runtime.request.images.slices import Slice
    from moevlm.runtime.request.videos.processor import PlannedVideo, VideoProcessor


class PromptBuilder:
    """Messages to prompts, for one bundle."""

    def __init__(
        self,
        model: ModelMetadata,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        images: ImageProcessor | None,
        videos: VideoProcessor | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._images = images
        self._videos = videos
        # What the template writes for an image and for a video, by the kind of part.
        self._placeholders = {} if model.image_placeholder is None else {"image": model.image_placeholder}
        if model.video is not None:
            self._placeholders["video"] = model.video.placeholder
        for kind, token_id in self._placeholders.items():
            text = tokenizer.token(token_id)
            if text is None or tokenizer.added.get(text) != token_id:
                raise BundleError(f"tokenizer.json has no added token for {kind}_token_id = {token_id}")
        self._guard = ControlGuard(tokenizer, control_tokens(tokenizer, template, model.control_token_ids))

    def build(
        self, messages: Sequence[Message], options: Mapping[str, Any] = NOTHING, max_image_tokens: int | None = None
    ) -> Prompt:
        """options: variables of the chat template. max_image_tokens: the most for an image or a slice of a video;
        larger ones are reduced.

        Raises RequestError for messages, images, videos or lengths that the model cannot take.
        """
        if max_image_tokens is not None:
            require_positive("max_image_tokens", max_image_tokens)
        # First, so that visuals_of meets messages in good order.
        self._refuse_video(plain_messages(messages, self._model.context))
        given = [replace(one, limits=replace(one.limits, max_tokens=max_image_tokens)) for one in visuals_of(messages)]
        require_tower(self._model, len(given))
        if given and self._images is None:
            raise RequestError(
                f"the prompt has {counted(len(given), 'image')}, and the bundle's checkpoint had no image preprocessing"
            )
        # By headers, so that nothing is decoded for a prompt that is too long; then only resized images are kept.
        planned = self._planned(given)
        ids = self.prompt_ids(messages, [self._ids(one) for one in planned], options)
        require_room(len(ids), self._model, bool(given))
        images: list[Image | Slice] = []
        sources: list[str] = []
        for number, one in enumerate(planned, 1):
            assert self._images is not None
            kind, pieces = (
                ("image", one.pieces(self._images)) if isinstance(one, _CountedImage) else ("video", one.slices())
            )
            images += pieces
            sources += [f"{kind} {number}"] * len(pieces)
        grids = [self._images.grid(image) for image in images] if self._images else []
        return Prompt.from_ids(ids, grids, self._model, images, sources)

    def _planned(self, given: Sequence[GivenImage | GivenVideo]) -> list[_CountedImage | PlannedVideo]:
        """Each image and video, to be decoded later, and how many visual tokens it has."""
        planned: list[_CountedImage | PlannedVideo] = []
        total = 0
        kinds = "images and videos" if any(isinstance(one, GivenVideo) for one in given) else "images"
        for one in given:
            if isinstance(one, GivenVideo):
                if self._videos is None:
                    raise RequestError("the prompt has a video, and the bundle's checkpoint had no video preprocessing")
                planned.append(self._videos.plan(one))
            elif self._images is not None:
                kept = replace(one, source=self._images.repeatable(one.source))
                layout = self._images.layout(kept.source, kept.limits)
                tokens = layout.tokens(self._model.tower)
                planned.append(_CountedImage(len(planned) + 1, kept, layout, tokens))
            total += planned[-1].tokens
            if total > self._model.context:
                raise RequestError(
                    f"the first {len(planned)} of the prompt's {len(given)} {kinds} have {total} tokens, "
                    f"the model's context {self._model.context}{smaller_images(self._model)}"
                )
        return planned

    def _ids(self, one: _CountedImage | PlannedVideo) -> list[int]:
        """The token ids that take a placeholder's place."""
        if isinstance(one, _CountedImage):
            return one.layout.ids(self._model)
        ids: list[int] = []
        video = self._model.video
        assert video is not None
        for before, tokens, behind in one.texts():
            ids += self._tokenizer.encode(before) if before else []
            ids += [*video.begin, *[video.token_id] * tokens, *video.end]
            ids += self._tokenizer.encode(behind) if behind else []
        return ids

    def prompt_ids(
        self, messages: Sequence[Message], images: Sequence[Sequence[int]], options: Mapping[str, Any] = NOTHING
    ) -> list[int]:
        """Token ids, with images[n] in the place of the n-th placeholder of an image or a video.

        Raises RequestError for an empty prompt, for a placeholder typed as text, and unless the template wrote one
        placeholder for each image and each video, in their order.
        """
        plain = plain_messages(messages, self._model.context)
        if not any(_has_content(message["content"]) for message in plain):
            raise RequestError("the prompt is empty: no message has text or an image")
        self._refuse_video(plain)
        self._refuse_placeholder(plain)
        text = self._template.render(texts_alone(plain) if self._model.vision is None else plain, options)
        if self._tokenizer.exceeds(text, self._model.context):
            raise RequestError(f"the prompt has more tokens than the model's context of {self._model.context}")
        ids = self._guard.encode(text)
        kinds = {token_id: kind for kind, token_id in self._placeholders.items()}
        found = [kinds[token] for token in ids if token in kinds]
        wanted = [part["type"] for message in plain for part in _parts(message["content"]) if part["type"] != "text"]
        if len(found) != len(images):
            marks = counted(len(found), "image placeholder")
            raise RequestError(f"the prompt has {marks}, {counted(len(images), 'image')} (allowed: one for each)")
        if found != wanted:
            raise RequestError("the chat template writes images and videos in another order than the messages")
        each = iter(images)
        return [t for token in ids for t in (next(each) if token in kinds else [token])]

    def _refuse_video(self, plain: Sequence[dict[str, Any]]) -> None:
        if self._model.video is None:
            require_no_video(plain, images=self._model.vision is not None)

    def _refuse_placeholder(self, plain: Sequence[dict[str, Any]]) -> None:
        # The guard would make it text like any other; but who types it wants an image there and would get none.
        for kind, token_id in self._placeholders.items():
            placeholder = str(self._tokenizer.token(token_id))
            for i, message in enumerate(plain):
                if any(placeholder in text for text in texts_of(message["content"])):
                    raise RequestError(
                        f"messages[{i}].content has {placeholder} as text (give {kind}s as parts of type {kind})"
                    )


@dataclass(frozen=True)
class _CountedImage:
    """An image, to be decoded later, its place among a prompt's, how it will be cut, and its visual tokens."""

    number: int
    given: GivenImage
    layout: ImageLayout
    tokens: int

    def pieces(self, images: ImageProcessor) -> list[Image]:
        opened = images.open(self.given.source)
        if images.layout(opened, self.given.limits) != self.layout:
            raise RequestError(f"image {self.number} changed while it was read")
        return images.fit(opened, self.given.limits)


def no_messages(tokenizer: Tokenizer | None) -> BundleError:
    """For a bundle whose checkpoint lacked a file: the tokenizer's, or else that of the chat template."""
    missing = "tokenizer.json" if tokenizer is None else "chat_template.jinja"
    remedy = "add one to the checkpoint, and build it again"
    return BundleError(f"the bundle has no {missing}: messages cannot be turned into tokens ({remedy})")


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [] if isinstance(content, str) else content


def _has_content(content: str | list[dict[str, str]]) -> bool:
    if isinstance(content, str):
        return bool(content)
    return any(part["type"] != "text" or part["text"] for part in content)
