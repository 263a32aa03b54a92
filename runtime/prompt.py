"""A prompt as the decoder takes it: token ids with every image expanded, and where each token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moevlm.runtime.chat import ChatTemplate, Message, Tokenizer, images_of, plain_messages
from moevlm.runtime.errors import BundleError, RequestError
from moevlm.runtime.guard import ControlGuard
from moevlm.runtime.manifest import ModelFacts
from moevlm.runtime.positions import rope_positions

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.images import ImageProcessor

Grid = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """One sequence before generation.

    ids: [S] int64. visual_index: [S] int64, running row of this prompt's visual features, -1 for text.
    positions: [3, S] int64, on the time, height and width axes. next_position: of the first generated token.
    images: opened, in the order of their tokens.
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
        cls, ids: Sequence[int] | np.ndarray, grids: Sequence[Grid], model: ModelFacts, images: Sequence[Image] = ()
    ) -> Prompt:
        """ids: [S], images already expanded. grids: each image's (h, w) in patches. Raises RequestError."""
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size == 0:
            raise RequestError("the prompt is empty")
        unknown = tokens[(tokens < 0) | (tokens >= model.vocabulary)]
        if unknown.size:
            raise BundleError(f"token id {unknown[0]} is outside the model's vocabulary of {model.vocabulary}")
        if len(tokens) > model.context:
            raise RequestError(f"the prompt has {len(tokens)} tokens, the model's context {model.context}")
        is_image = tokens == model.image_token_id
        visual_index = np.where(is_image, np.cumsum(is_image) - 1, -1)
        positions, next_position = rope_positions(tokens, list(grids), model)
        return cls(tokens, visual_index, positions, next_position, tuple(images))


class PromptBuilder:
    """Messages to prompts, for one bundle."""

    def __init__(
        self, model: ModelFacts, tokenizer: Tokenizer, template: ChatTemplate, images: ImageProcessor | None
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._images = images
        self._guard = ControlGuard(tokenizer.special)
        placeholder = tokenizer.token(model.image_token_id)
        if placeholder is None or tokenizer.special.get(placeholder) != model.image_token_id:
            raise BundleError(f"tokenizer.json has no special token for image_token_id = {model.image_token_id}")
        self._placeholder = placeholder

    def build(self, messages: Sequence[Message]) -> Prompt:
        """Raises RequestError for messages, images or lengths that the model cannot take."""
        plain_messages(messages)  # so that images_of meets messages in good order
        given = images_of(messages)
        if given and self._images is None:
            raise RequestError(f"the prompt has {len(given)} images, and this runtime was made without image input")
        images: list[Image] = [self._images.open(image) for image in given] if self._images else []
        grids: list[Grid] = [self._images.grid(image) for image in images] if self._images else []
        merged = self._model.vision.merge_size**2
        ids = self.prompt_ids(messages, [h * w // merged for h, w in grids])
        return Prompt.from_ids(ids, grids, self._model, images)

    def prompt_ids(self, messages: Sequence[Message], image_token_counts: Sequence[int]) -> list[int]:
        """Token ids, with the n-th image placeholder repeated image_token_counts[n] times.

        Raises RequestError for an empty prompt, for a placeholder typed as text, and unless the template wrote one
        placeholder for each image.
        """
        plain = plain_messages(messages)
        if not any(_has_content(message["content"]) for message in plain):
            raise RequestError("the prompt is empty: no message has text or an image")
        self._refuse_placeholder(plain)
        hidden, originals = self._guard.hide(plain)
        pieces = self._guard.split(self._template.render(hidden), originals)
        ids = [token for piece in pieces for token in self._tokenizer.encode(piece)]
        found = ids.count(self._model.image_token_id)
        if found != len(image_token_counts):
            raise RequestError(
                f"the prompt has {found} image placeholders, {len(image_token_counts)} images (allowed: one for each)"
            )
        counts = iter(image_token_counts)
        return [t for token in ids for t in [token] * (next(counts) if token == self._model.image_token_id else 1)]

    def _refuse_placeholder(self, plain: Sequence[dict[str, Any]]) -> None:
        # The guard would make it text like any other; but who types it wants an image there and would get none.
        for i, message in enumerate(plain):
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            if any(self._placeholder in part for part in parts):
                raise RequestError(
                    f"messages[{i}].content has {self._placeholder} as text (give images as parts of type image)"
                )


def _has_content(content: str | list[dict[str, str]]) -> bool:
    if isinstance(content, str):
        return bool(content)
    return any(part["type"] == "image" or part["text"] for part in content)
