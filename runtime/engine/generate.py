"""Text from messages and images: one request at a time, streamed, on any engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError, RequestError, one_line, require_positive, shown
from moevlm.runtime.core.manifest import ModelMetadata, TensorRTMetadata
from moevlm.runtime.engine.answer import Answer, FinishReason, Meter, Piece
from moevlm.runtime.engine.batch import Batch, cache_capacity
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.protocol import Engine, VisualFeatures
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
        built_for: TensorRTMetadata | None = None,
        target: str = "",
        sampling: SamplingParams | None = None,
    ) -> None:
        """chunk_tokens: the most prompt tokens that go through the decoder in one step. target: the engine's name.

        sampling: of requests that say nothing, by default greedy.
        built_for: sizes that the engine cannot exceed. A step takes at most its chunk_tokens and max_visual, `context`
        is at most its capacity, and images with more patches than its max_patches are refused.
        """
        require_positive("chunk_tokens", chunk_tokens)
        self.model = model
        self.target = target
        self.sampling = sampling or SamplingParams()
        self.tokenizer = tokenizer
        self.engine = engine
        self.chunk_tokens = chunk_tokens
        self.context = model.context
        self._max_patches: int | None = None
        if built_for is not None:
            # No step of one sequence can use more visual rows than it has tokens.
            self.chunk_tokens = min(chunk_tokens, built_for.chunk_tokens, built_for.max_visual)
            self.context = min(model.context, built_for.capacity)
            self._max_patches = built_for.max_patches
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

    def batch(
        self,
        prompts: Sequence[Prompt],
        visual: VisualFeatures | None,
        new_tokens: int,
        cancellation: Cancellation | None = None,
    ) -> Batch:
        """An empty cache with room for the prompts and `new_tokens` more, or as many as the context leaves."""
        longest = max(len(prompt.ids) for prompt in prompts)
        capacity = cache_capacity(longest + new_tokens, self.context)
        return Batch(self.engine, self.model, prompts, visual, capacity, cancellation)

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
        with meter.timed("prefill_seconds"):
            batch = self.batch([prompt], visual, budget, cancellation)
        del visual  # the batch lets go of it after the prefill
        try:
            sampled = None
            for count in range(1, budget + 1):
                with meter.timed("decode_seconds" if sampled else "prefill_seconds"):
                    logits = batch.decode([sampled.token_id]) if sampled else batch.prefill(self.chunk_tokens)
                    sampled = sampler.sample(logits[0])
                    fresh, reason = self._advance(text, sampled.token_id, params, count == budget)
                    meter.count_token()
                if reason is not None:
                    batch.release()  # before the reader sees the last piece: it may never come back for the end
                    yield Piece(fresh, (sampled.token_id,), (sampled,), reason, meter.usage)
                    return
                yield Piece(fresh, (sampled.token_id,), (sampled,))
        finally:
            batch.release()

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
