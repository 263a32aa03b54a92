"""A prompt as the decoder takes it: token ids with every image expanded, and where each token stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moevlm.runtime.core.errors import BundleError, RequestError, require_positive, shown
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.towers import Grid
from moevlm.runtime.request.chat import NOTHING, ChatTemplate
from moevlm.runtime.request.messages import GivenImage, Message, images_of, plain_messages, texts_of
from moevlm.runtime.request.positions import rope_positions
from moevlm.runtime.request.special_tokens import ControlGuard, control_tokens
from moevlm.runtime.request.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.request.images.processor import ImageProcessor

MAX_SIDE = 1 << 20  # patches; products of two such fit into int64

SMALLER_IMAGES = "max_image_tokens makes images smaller"


@dataclass(frozen=True)
class Prompt:
    """One sequence before generation.

    ids: [S] int64. visual_index: [S] int64, running row of this prompt's visual features, -1 for text.
    positions: [3, S] int64, on the time, height and width axes. next_position: of the first generated token.
    images: resized to whole patches, in the order of their tokens.
    """

    ids: np.ndarray
    visual_index: np.ndarray
    positions: np.ndarray
    next_position: int
    images: tuple[Image, ...] = ()

    @property
    def image_tokens(self) -> int:
        return int(np.count_nonzero(self.visual_index >= 0))

    @classmethod
    def from_ids(
        cls, ids: Sequence[int] | np.ndarray, grids: Sequence[Grid], model: ModelMetadata, images: Sequence[Image] = ()
    ) -> Prompt:
        """ids: [S], images already expanded. grids: each image's (h, w) in patches. Raises RequestError."""
        tokens = _token_ids(ids, model)
        _require_room(len(tokens), model)
        _check_grids(grids, model)
        is_image = tokens == model.image_token_id
        visual_index = np.where(is_image, np.cumsum(is_image) - 1, -1)
        positions, next_position = rope_positions(tokens, list(grids), model)
        return cls(tokens, visual_index, positions, next_position, tuple(images))


class PromptBuilder:
    """Messages to prompts, for one bundle."""

    def __init__(
        self, model: ModelMetadata, tokenizer: Tokenizer, template: ChatTemplate, images: ImageProcessor | None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._images = images
        placeholder = tokenizer.token(model.image_token_id)
        if placeholder is None or tokenizer.added.get(placeholder) != model.image_token_id:
            raise BundleError(f"tokenizer.json has no added token for image_token_id = {model.image_token_id}")
        self._placeholder = placeholder
        self._guard = ControlGuard(tokenizer, control_tokens(tokenizer, template, model.eos_token_ids))

    def build(
        self, messages: Sequence[Message], options: Mapping[str, Any] = NOTHING, max_image_tokens: int | None = None
    ) -> Prompt:
        """options: variables of the chat template. max_image_tokens: the most for an image; larger ones are reduced.

        Raises RequestError for messages, images or lengths that the model cannot take.
        """
        if max_image_tokens is not None:
            require_positive("max_image_tokens", max_image_tokens)
        plain_messages(messages, self._model.context)  # so that images_of meets messages in good order
        given = [replace(one, limits=replace(one.limits, max_tokens=max_image_tokens)) for one in images_of(messages)]
        if given and self._images is None:
            raise RequestError(f"the prompt has {len(given)} images, and this runtime was made without image input")
        # By headers, so that nothing is decoded for a prompt that is too long; then only resized images are kept.
        counted = self._counted(given)
        ids = self.prompt_ids(messages, [image_ids(tokens, self._model) for _, tokens in counted], options)
        _require_room(len(ids), self._model, bool(given))
        images: list[Image] = []
        grids: list[Grid] = []
        for one, tokens in counted:
            assert self._images is not None
            images.append(self._images.fit(self._images.open(one.source), one.limits))
            grids.append(self._images.grid(images[-1]))
            if self._model.vision.tokens(grids[-1]) != tokens:
                raise RequestError(f"image {len(images)} changed while it was read")
        return Prompt.from_ids(ids, grids, self._model, images)

    def _counted(self, images: Sequence[GivenImage]) -> list[tuple[GivenImage, int]]:
        """Each image, to be decoded later, and how many visual tokens it has."""
        counted: list[tuple[GivenImage, int]] = []
        total = 0
        if self._images is not None:
            for image in images:
                kept = replace(image, source=self._images.repeatable(image.source))
                counted.append((kept, self._images.tokens(kept.source, kept.limits)))
                total += counted[-1][1]
                if total > self._model.context:
                    raise RequestError(
                        f"the first {len(counted)} of the prompt's {len(images)} images have {total} tokens, "
                        f"the model's context {self._model.context} ({SMALLER_IMAGES})"
                    )
        return counted

    def prompt_ids(
        self, messages: Sequence[Message], images: Sequence[Sequence[int]], options: Mapping[str, Any] = NOTHING
    ) -> list[int]:
        """Token ids, with images[n] in the place of the n-th image placeholder.

        Raises RequestError for an empty prompt, for a placeholder typed as text, and unless the template wrote one
        placeholder for each image.
        """
        plain = plain_messages(messages, self._model.context)
        if not any(_has_content(message["content"]) for message in plain):
            raise RequestError("the prompt is empty: no message has text or an image")
        self._refuse_placeholder(plain)
        text = self._template.render(plain, options)
        if self._tokenizer.exceeds(text, self._model.context):
            raise RequestError(f"the prompt has more tokens than the model's context of {self._model.context}")
        ids = self._guard.encode(text)
        found = ids.count(self._model.image_token_id)
        if found != len(images):
            raise RequestError(
                f"the prompt has {found} image placeholders, {len(images)} images (allowed: one for each)"
            )
        each = iter(images)
        return [t for token in ids for t in (next(each) if token == self._model.image_token_id else [token])]

    def _refuse_placeholder(self, plain: Sequence[dict[str, Any]]) -> None:
        # The guard would make it text like any other; but who types it wants an image there and would get none.
        for i, message in enumerate(plain):
            if any(self._placeholder in text for text in texts_of(message["content"])):
                raise RequestError(
                    f"messages[{i}].content has {self._placeholder} as text (give images as parts of type image)"
                )


def image_ids(tokens: int, model: ModelMetadata) -> list[int]:
    """The token ids that take a placeholder's place. tokens: how many visual tokens the image has."""
    return [*model.image_begin, *[model.image_token_id] * tokens, *model.image_end]


def _token_ids(ids: Sequence[int] | np.ndarray, model: ModelMetadata) -> np.ndarray:
    """[S] int64, each inside the vocabulary."""
    try:
        tokens = np.asarray(ids)
    except (TypeError, ValueError, OverflowError):  # lists of different lengths
        tokens = np.empty((), object)
    if tokens.size == 0 and tokens.ndim == 1:
        raise RequestError("the prompt is empty")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RequestError(f"unsupported value ids = {shown(ids)} (allowed: a list of whole numbers)")
    unknown = tokens[(tokens < 0) | (tokens >= model.vocabulary)]
    if unknown.size:
        raise RequestError(f"token id {unknown[0]} is outside the model's vocabulary of {model.vocabulary}")
    return tokens.astype(np.int64)


def _check_grids(grids: Sequence[Grid], model: ModelMetadata) -> None:
    merge = model.vision.merge_size
    for grid in grids if isinstance(grids, (list, tuple)) else [grids]:
        pair = grid if isinstance(grid, (list, tuple)) else ()
        good = len(pair) == 2 and all(isinstance(n, (int, np.integer)) and 0 < n <= MAX_SIDE for n in pair)
        if not good or any(n % merge for n in pair):
            raise RequestError(f"unsupported value grids = {shown(grids)} (allowed: (h, w), multiples of {merge})")


def _require_room(tokens: int, model: ModelMetadata, images: bool = False) -> None:
    if tokens > model.context:
        remedy = f" ({SMALLER_IMAGES})" if images else ""
        raise RequestError(f"the prompt has {tokens} tokens, the model's context {model.context}{remedy}")


def _has_content(content: str | list[dict[str, str]]) -> bool:
    if isinstance(content, str):
        return bool(content)
    return any(part["type"] == "image" or part["text"] for part in content)
