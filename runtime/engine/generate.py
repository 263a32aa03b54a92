"""Text from messages and images: one request at a time, streamed, on any engine."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError, EngineError, RequestError, one_line, require_positive, shown
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.states import page_bytes
from moevlm.runtime.engine.answer import Answer, FinishReason, Meter, Piece
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Engine, VisualFeatures
from moevlm.runtime.engine.single import SingleSequence
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.detokenize import StreamDecoder
from moevlm.runtime.request.messages import Message
from moevlm.runtime.request.prompt import SMALLER_IMAGES, Prompt, PromptBuilder
from moevlm.runtime.request.sampler import Sampler
from moevlm.runtime.request.sampling import SamplingOptions, SamplingParams
from moevlm.runtime.request.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from moevlm.runtime.request.images import ImageProcessor

# Images are encoded together up to so many patches: enough for full speed, few enough for a bounded memory and for a
# cancellation to be heard between two calls.
ENCODED_PATCHES = 4096
SEQUENCES = 16  # requests at a time that all find room, however long they grow


class Runtime:
    """A loaded bundle on one engine. Threads may share it: every request has a cache and a random stream of its own.

    Without a tokenizer it takes prompts of token ids, and pieces have no text; without a template no messages.
    """

    def __init__(
        self,
        model: ModelMetadata,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        engine: Engine,
        images: ImageProcessor | None = None,
        *,
        chunk_tokens: int = defaults.CHUNK_TOKENS,
        target: str = "",
        sampling: SamplingParams | None = None,
    ) -> None:
        """chunk_tokens: the most prompt tokens that go through the decoder in one step. target: the engine's name.

        sampling: of requests that say nothing, by default greedy. A step takes at most the tokens, `context` is at
        most the context, and images have at most the patches of the engine's limits.
        """
        require_positive("chunk_tokens", chunk_tokens)
        self.model = model
        self.target = target
        self.sampling = sampling or SamplingParams()
        self.tokenizer = tokenizer
        self.engine = engine
        limits = engine.limits
        self.chunk_tokens = min(chunk_tokens, limits.max_tokens)
        self.context = min(model.context, limits.max_context)
        self._max_patches = limits.max_patches
        self._lock = threading.Lock()
        self._free_pages: list[int] = []
        self._free_rows: list[int] = []
        self._images = images
        self._prompts = PromptBuilder(model, tokenizer, template, images) if tokenizer and template else None

    def prompt(
        self,
        messages: Sequence[Message],
        template_options: Mapping[str, Any] | None = None,
        max_image_tokens: int | None = None,
    ) -> Prompt:
        """Messages as the decoder takes them, images decoded and resized.

        A last message of the assistant is continued. template_options: JSON values for variables of the chat template,
        such as {"enable_thinking": False}; one that the template does not read is refused. max_image_tokens: the most
        for an image; larger ones are resized as the model's processor does it.
        Raises RequestError, and BundleError if there is no tokenizer or no template.
        """
        if self._prompts is None:
            missing = "chat_template.jinja" if self.tokenizer else "tokenizer.json"
            raise BundleError(f"the bundle has no {missing}: messages cannot be turned into tokens")
        return self._prompts.build(messages, template_options or {}, max_image_tokens)

    def encode(self, prompts: Sequence[Prompt], cancellation: Cancellation | None = None) -> VisualFeatures | None:
        """Features of all images of all prompts, in order; None without images. Raises Cancelled."""
        images = [image for prompt in prompts for image in prompt.images]
        if not images or self._images is None:
            return None
        cancellation = cancellation or Cancellation()
        parts = []
        for group in self._groups(images, self._images):
            cancellation.check()
            inputs, _ = self._images.pack(group)
            parts.append(self.engine.encode(inputs, cancellation))
        return VisualFeatures(
            np.concatenate([part.embeds for part in parts]), np.concatenate([part.deepstack for part in parts], axis=1)
        )

    def _groups(self, images: Sequence[Image], processor: ImageProcessor) -> Iterator[list[Image]]:
        """Consecutive images that are encoded in one call."""
        most = self._max_patches or ENCODED_PATCHES
        group: list[Image] = []
        patches = 0
        for image in images:
            size = math.prod(processor.grid(image))
            if group and patches + size > most:
                yield group
                group, patches = [], 0
            group.append(image)
            patches += size
        yield group

    @contextmanager
    def _pages(self, tokens: int) -> Iterator[tuple[list[int], int]]:
        """Pages for so many tokens and a state row, until the block ends."""
        size = self.engine.limits.page_size
        with self._lock:
            if not self._free_rows:
                self._reserve(-(-self.context // size))
            count = -(-tokens // size)
            if len(self._free_pages) < count or len(self._free_rows) < 2:
                raise EngineError(f"no room for {tokens} tokens beside the other requests")
            pages = [self._free_pages.pop() for _ in range(count)]
            row = self._free_rows.pop()
        try:
            yield pages, row
        finally:
            with self._lock:
                self._free_pages += reversed(pages)
                self._free_rows.append(row)

    def _reserve(self, each: int) -> None:
        """Pages for several sequences of `each` pages, as far as this machine has memory for them all."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        fitting = memory // max(page_bytes(self.engine.states, self.engine.limits.page_size), 1)
        pages = 1 + max(each, min(SEQUENCES * each, fitting))
        self.engine.reserve(pages, 2 + SEQUENCES)
        self._free_pages, self._free_rows = list(range(pages - 1, 0, -1)), list(range(1 + SEQUENCES, 0, -1))

    def generate(
        self,
        messages: Sequence[Message] | Prompt,
        *,
        params: SamplingParams | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_image_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Stream the assistant's answer.

        params: exactly how; by default `sampling`, with which the model was released. Options are fields of
        SamplingParams, on top: temperature=0 is greedy.

        template_options, max_image_tokens: see `prompt`.
        The request is checked and its images are decoded here, before the first piece is asked for: RequestError.
        max_new_tokens is cut to what the context leaves. Closing the answer, or an exception in it, frees the cache.
        """
        chosen = _chosen(params, self.sampling, options)
        self._check_stops(chosen)
        if isinstance(messages, Prompt):
            for name, value in (("template_options", template_options), ("max_image_tokens", max_image_tokens)):
                if value is not None and value != {}:
                    raise RequestError(f"{name} has no effect on a prompt that is ready (allowed: with messages)")
            prompt = messages
        else:
            prompt = self.prompt(messages, template_options, max_image_tokens)
        self._check_images(prompt)
        room = self.context - len(prompt.ids)
        if room < 1:
            whose = "model" if self.context == self.model.context else "engine"
            remedy = f" ({SMALLER_IMAGES})" if prompt.image_tokens else ""
            raise RequestError(
                f"the prompt has {len(prompt.ids)} tokens and leaves no room in the {whose}'s context of {self.context}"
                f"{remedy}"
            )
        meter, cancellation = Meter(len(prompt.ids), prompt.image_tokens), Cancellation()
        stream = self._stream(prompt, chosen, min(chosen.max_new_tokens, room), meter, cancellation)
        return Answer(stream, meter, cancellation)

    def _check_stops(self, params: SamplingParams) -> None:
        if params.stop and self.tokenizer is None:
            raise RequestError("stop needs text, and the bundle has no tokenizer.json")
        special = self.tokenizer.special if self.tokenizer and params.skip_special_tokens else {}
        for stop in params.stop:
            if stop not in special and any(token in stop for token in special):
                raise RequestError(
                    f"unsupported value stop = {shown(stop)} (allowed: a special token alone, or text without one: "
                    "they are left out of the text)"
                )

    def _check_images(self, prompt: Prompt) -> None:
        for number, image in enumerate(prompt.images, 1):
            if self._images is None or self._max_patches is None:
                return
            patches = math.prod(self._images.grid(image))
            if patches > self._max_patches:
                raise RequestError(
                    f"image {number} has {patches} patches, the engine was built for up to {self._max_patches} "
                    f"({SMALLER_IMAGES}: at most {self._max_patches // self.model.vision.merge_size**2} here)"
                )

    def close(self) -> None:
        """Free what the engine holds. No answer can be generated after that."""
        self.engine.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(
        self, prompt: Prompt, params: SamplingParams, budget: int, meter: Meter, cancellation: Cancellation
    ) -> Generator[Piece, None, None]:
        sampler = Sampler(params, prompt.ids)
        text = (
            None if self.tokenizer is None else StreamDecoder(self.tokenizer, params.stop, params.skip_special_tokens)
        )
        with meter.timed("vision_seconds"):
            visual = self.encode([prompt], cancellation)
        prompt = dataclasses.replace(prompt, images=())  # not needed any more
        with self._pages(len(prompt.ids) + budget) as (pages, row):
            sequence = SingleSequence(self.engine, self.model, prompt, visual, pages, row, cancellation)
            del visual  # the sequence lets go of it after the prefill
            sampled = None
            for count in range(1, budget + 1):
                with meter.timed("decode_seconds" if sampled else "prefill_seconds"):
                    logits = sequence.decode(sampled.token_id) if sampled else sequence.prefill(self.chunk_tokens)
                    sampled = sampler.sample(logits)
                    fresh, reason = self._advance(text, sampled.token_id, params, count == budget)
                    meter.count_token()
                if reason is not None:
                    break
                yield Piece(fresh, (sampled.token_id,), (sampled,))
        # After its pages were given back: the reader may never come back for the end.
        assert sampled is not None
        yield Piece(fresh, (sampled.token_id,), (sampled,), reason, meter.usage)

    def _advance(
        self, text: StreamDecoder | None, token: int, params: SamplingParams, last: bool
    ) -> tuple[str, FinishReason | None]:
        """Text that one more token makes certain, and why the sequence ends with it, if it does."""
        ends = token in self.model.eos_token_ids and not params.ignore_eos
        if text is None:
            return "", "stop" if ends else "length" if last else None
        fresh = "" if ends else text.push(token)
        if ends or (last and text.stopped is None):
            fresh += text.flush()
        if ends or text.stopped is not None:
            return fresh, "stop"
        return fresh, "length" if last else None


def _chosen(params: SamplingParams | None, otherwise: SamplingParams, options: SamplingOptions) -> SamplingParams:
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(f"unsupported value params = {shown(params)} (allowed: SamplingParams)")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    for name in options:
        if name not in known:
            raise RequestError(f"unsupported option {one_line(name, 60)} (supported: {', '.join(sorted(known))})")
    return (params or otherwise).updated(options)
