"""Text from messages and images: the requests of a runtime, on whatever engine."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import (
    Cancelled,
    EngineError,
    RequestError,
    require_positive,
)
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.answer import Answer, Completion, Piece
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.image_features import FeatureCache, ImageEncoder
from moevlm.runtime.engine.loop import EngineLoop
from moevlm.runtime.engine.packing import StepPacker
from moevlm.runtime.engine.pages import PagePool
from moevlm.runtime.engine.pool_size import PoolSize
from moevlm.runtime.engine.prompt_image import PromptImage
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.engine.request_checks import check_stops, chosen_params, end_of
from moevlm.runtime.engine.scheduler import Scheduler
from moevlm.runtime.engine.sequence import AHEAD, Ending
from moevlm.runtime.engine.sequence import Sequence as Request
from moevlm.runtime.engine.visual import VisualFeatures
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.detokenize import StreamDecoder
from moevlm.runtime.request.messages import Message
from moevlm.runtime.request.prompt import Prompt, smaller_images
from moevlm.runtime.request.prompt_builder import PromptBuilder, no_messages
from moevlm.runtime.request.sampling import SamplingOptions, SamplingParams
from moevlm.runtime.request.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moevlm.runtime.request.images.processor import ImageProcessor
    from moevlm.runtime.request.videos.processor import VideoProcessor

CACHE = "cache's"  # what limits the context


class Runtime:
    """A loaded bundle on one engine. Threads may share it: requests that run at the same time share its steps.

    Without a tokenizer it takes prompts of token ids, and pieces have no text; without a template no messages.
    """

    def __init__(
        self,
        model: ModelMetadata,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        engine: Engine,
        images: ImageProcessor | None = None,
        videos: VideoProcessor | None = None,
        *,
        chunk_tokens: int | None = None,
        target: str = "",
        sampling: SamplingParams | None = None,
        cache_memory: int | None = None,
        feature_memory: int = defaults.FEATURE_MEMORY,
    ) -> None:
        """chunk_tokens: the most prompt tokens that go through the decoder in one step; by default the engine's number.

        target: the engine's name. sampling: of requests that say nothing, by default greedy. cache_memory: bytes for
        what requests keep in the engine, by default as many as it has and they can use. feature_memory: bytes for
        features of images.
        A step takes at most the tokens, `context` is at most the context, and images have at most the patches of the
        engine's limits; `context` is at most what fits into the cache, too.
        Raises RequestError for a memory in which nothing fits, and EngineError if there is too little.
        """
        if chunk_tokens is not None:
            require_positive("chunk_tokens", chunk_tokens)
        self.model = model
        self.target = target
        self.sampling = sampling or SamplingParams()
        self.tokenizer = tokenizer
        self.engine = engine
        limits = engine.limits
        self.chunk_tokens = min(chunk_tokens or limits.chunk_tokens, limits.max_tokens)
        self.context = min(model.context, limits.max_context)
        size = PoolSize.of(limits, engine.states, self.context, cache_memory)
        self._whose = "model's" if self.context == model.context else "engine's"
        if (size.pages - 1) * limits.page_size < self.context:
            self.context, self._whose = (size.pages - 1) * limits.page_size, CACHE
        self._prompts = PromptBuilder(model, tokenizer, template, images, videos) if tokenizer and template else None
        self._encoder = ImageEncoder(engine, images, model.tower) if images else None
        engine.reserve(size.pages, size.rows)
        scheduler = Scheduler(
            limits,
            PagePool(size.pages, limits.page_size, size.rows),
            vocabulary=model.vocabulary,
            chunk_tokens=self.chunk_tokens,
        )
        packer = StepPacker(model.ropes, whole_images=model.bidirectional_images, query_scale=model.query_scale)
        self.loop = EngineLoop(engine, scheduler, packer, self._encoder, FeatureCache(feature_memory))

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
            raise no_messages(self.tokenizer)
        return self._prompts.build(messages, template_options or {}, max_image_tokens)

    def encode(self, prompts: Sequence[Prompt], cancellation: Cancellation | None = None) -> list[VisualFeatures]:
        """Features of each image of all prompts, in order. Raises Cancelled."""
        images = [image for prompt in prompts for image in prompt.images]
        if not images or self._encoder is None:
            return []
        return list(self._encoder.encode(images, cancellation or Cancellation()))

    def generate(
        self,
        messages: Sequence[Message] | Prompt,
        *,
        params: SamplingParams | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_image_tokens: int | None = None,
        deadline: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Stream the assistant's answer.

        params: exactly how; by default `sampling`, with which the model was released. Options are fields of
        SamplingParams, on top: temperature=0 is greedy.

        template_options, max_image_tokens: see `prompt`. deadline: seconds from now, after which the answer ends by
        DeadlineExceeded.
        The request is checked and its images are decoded here, before the first piece is asked for: RequestError.
        max_new_tokens is cut to what the context leaves. Closing the answer, or an exception in it, frees its cache.
        Other requests of this runtime that run at the same time take part in the same steps; a piece may be made while
        the reader is at the one before.
        """
        request = self.sequence(
            messages,
            params=params,
            template_options=template_options,
            max_image_tokens=max_image_tokens,
            deadline=deadline,
            **options,
        )
        return Answer(self._stream(request), request.meter, request.cancellation)

    def generate_many(
        self,
        requests: Sequence[Sequence[Message] | Prompt],
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        deadline: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Whole answers, in the order of the requests, which share steps.

        requests: messages or ready prompts. params, options: as in `generate`, of all requests or one each. deadline:
        of all of them, as in `generate`.
        All requests are checked before the first step: RequestError. An error that ends one ends all.
        """
        each = [params] * len(requests) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(requests):
            raise RequestError(f"{len(each)} params for {len(requests)} requests (allowed: one, or one for each)")
        started: list[Request] = []
        try:
            for messages, chosen in zip(requests, each, strict=True):
                started.append(self.sequence(messages, params=chosen, ahead=math.inf, deadline=deadline, **options))
            for request in started:
                self.loop.add(request)
            return [Completion.of(list(self._pieces(request))) for request in started]
        finally:
            for request in started:
                self.loop.leave(request)

    def sequence(
        self,
        messages: Sequence[Message] | Prompt,
        *,
        params: SamplingParams | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_image_tokens: int | None = None,
        ahead: float = AHEAD,
        deadline: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Request:
        """A request for `loop`: see `generate` and Sequence."""
        ends = end_of(deadline)
        chosen = chosen_params(params, self.sampling, options)
        check_stops(chosen, self.tokenizer)
        if isinstance(messages, Prompt):
            for name, value in (("template_options", template_options), ("max_image_tokens", max_image_tokens)):
                if value is not None and value != {}:
                    raise RequestError(f"{name} has no effect on a prompt that is ready (allowed: with messages)")
            prompt = messages
        else:
            prompt = self.prompt(messages, template_options, max_image_tokens)
        if self._encoder is not None:
            self._encoder.check(prompt)
        room = self.context - len(prompt.ids)
        if room < 1:
            smaller = smaller_images(self.model) if prompt.image_tokens else ""
            raise RequestError(
                f"the prompt has {len(prompt.ids)} tokens and leaves no room in the {self._whose} context of "
                f"{self.context}{' (a larger cache_memory holds more)' if self._whose == CACHE else smaller}"
            )
        images: tuple[PromptImage, ...] = ()
        if self._encoder is not None:
            images = tuple(PromptImage.of(image, self._encoder.tokens(image)) for image in prompt.images)
        rows = sum(image.tokens for image in images)
        if rows != prompt.image_tokens:
            raise EngineError(f"{rows} visual features for {prompt.image_tokens} image tokens")
        text = None
        if self.tokenizer is not None:
            text = StreamDecoder(self.tokenizer, chosen.stop, chosen.skip_special_tokens)
        eos = frozenset() if chosen.ignore_eos else frozenset(self.model.eos_token_ids)
        ending = Ending(min(chosen.max_new_tokens, room), eos, text, ends)
        request = Request(prompt, chosen, ending, images, ahead=ahead, whole_images=self.model.bidirectional_images)
        self.loop.check(request)
        return request

    def forget(self) -> None:
        """Drop what is kept of ended requests, from which later ones that begin alike take it: text and images."""
        self.loop.forget()

    def close(self) -> None:
        """Free what the engine holds. No answer can be generated after that."""
        self.engine.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, request: Request) -> Generator[Piece, None, None]:
        """Pieces of a request that nobody else has begun; whoever leaves it ends it."""
        try:
            self.loop.add(request)
            yield from self._pieces(request)
        finally:
            self.loop.leave(request)

    def _pieces(self, request: Request) -> Generator[Piece, None, None]:
        """Raises Cancelled where a request ends without a last piece."""
        while piece := self.loop.next_piece(request):
            yield piece
            if piece.finish_reason is not None:
                return
        raise Cancelled("the request was cancelled")
