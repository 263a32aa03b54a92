"""Text from messages and images: one request at a time, streamed, on any engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moevlm.runtime import defaults
from moevlm.runtime.batch import Batch, cache_capacity
from moevlm.runtime.chat import ChatTemplate, Message, Tokenizer
from moevlm.runtime.detokenize import StreamDecoder
from moevlm.runtime.engine import Engine, VisualFeatures
from moevlm.runtime.errors import BundleError, RequestError
from moevlm.runtime.manifest import ModelFacts, TensorRTFacts
from moevlm.runtime.prompt import Prompt, PromptBuilder
from moevlm.runtime.sampling import Sampled, Sampler, SamplingParams

if TYPE_CHECKING:
    from moevlm.runtime.images import ImageProcessor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Usage:
    """What a request cost. Seconds are the runtime's own work, without the time its reader took between pieces.

    prompt_tokens include image_tokens; new_tokens include the end-of-sequence token. vision_seconds: cutting the
    images into patches and encoding them. prefill_seconds: the prompt up to and with the choice of the first token.
    decode_seconds: all later tokens, so decode_seconds / (new_tokens - 1) is the time between two tokens.
    """

    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Piece:
    """What one step added. text may be "" while a character or a possible stop string is unfinished.

    token_ids include the end-of-sequence token; sampled has one entry for each of them.
    finish_reason and usage are None on all pieces but the last.
    """

    text: str
    token_ids: tuple[int, ...]
    sampled: tuple[Sampled, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Runtime:
    """A loaded bundle on one engine. Threads may share it: every request has a cache and a random stream of its own.

    Without a tokenizer it takes prompts of token ids, and pieces have no text; without a template no messages.
    """

    def __init__(
        self,
        model: ModelFacts,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        engine: Engine,
        images: ImageProcessor | None = None,
        *,
        chunk_tokens: int = defaults.CHUNK_TOKENS,
        built_for: TensorRTFacts | None = None,
        target: str = "",
    ) -> None:
        """chunk_tokens: the most prompt tokens that go through the decoder in one step. target: the engine's name.

        built_for: sizes that the engine cannot exceed. A step takes at most its chunk_tokens and max_visual, `context`
        is at most its capacity, and images with more patches than its max_patches are refused.
        """
        require_positive("chunk_tokens", chunk_tokens)
        self.model = model
        self.target = target
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

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Messages as the decoder takes them, images decoded and resized. Raises RequestError.

        BundleError if there is no tokenizer or no template.
        """
        if self._prompts is None:
            missing = "chat_template.jinja" if self.tokenizer else "tokenizer.json"
            raise BundleError(f"the bundle has no {missing}: messages cannot be turned into tokens")
        return self._prompts.build(messages)

    def encode(self, prompts: Sequence[Prompt]) -> VisualFeatures | None:
        """Features of all images of all prompts, in order, from one packed call; None without images."""
        images = [image for prompt in prompts for image in prompt.images]
        if not images or self._images is None:
            return None
        inputs, _ = self._images.pack(images)
        return self.engine.encode(inputs)

    def batch(self, prompts: Sequence[Prompt], visual: VisualFeatures | None, new_tokens: int) -> Batch:
        """An empty cache with room for the prompts and `new_tokens` more, or as many as the context leaves."""
        longest = max(len(prompt.ids) for prompt in prompts)
        capacity = cache_capacity(longest + new_tokens, self.context)
        return Batch(self.engine, self.model, prompts, visual, capacity)

    def generate(
        self, messages: Sequence[Message] | Prompt, *, params: SamplingParams | None = None, **overrides: Any
    ) -> Generator[Piece, None, None]:
        """Stream the assistant's answer. Overrides are fields of SamplingParams, on top of `params`.

        The request is checked here, before the first piece is asked for: RequestError. max_new_tokens is cut to what
        the context leaves. Closing the generator, or an exception in it, gives the cache back.
        """
        chosen = _with_overrides(params or SamplingParams(), overrides)
        prompt = messages if isinstance(messages, Prompt) else self.prompt(messages)
        self._check_images(prompt)
        room = self.context - len(prompt.ids)
        if room < 1:
            whose = "model" if self.context == self.model.context else "engine"
            raise RequestError(
                f"the prompt has {len(prompt.ids)} tokens and leaves no room in the {whose}'s context of {self.context}"
            )
        return self._stream(prompt, chosen, min(chosen.max_new_tokens, room))

    def _check_images(self, prompt: Prompt) -> None:
        for number, image in enumerate(prompt.images, 1):
            if self._images is None or self._max_patches is None:
                return
            patches = math.prod(self._images.grid(image))
            if patches > self._max_patches:
                raise RequestError(
                    f"image {number} has {patches} patches, the engine was built for up to {self._max_patches}: "
                    "make it smaller"
                )

    def close(self) -> None:
        """Free what the engine holds. No answer can be generated after that."""
        self.engine.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, prompt: Prompt, params: SamplingParams, budget: int) -> Generator[Piece, None, None]:
        sampler = Sampler(params, prompt.ids)
        text = None if self.tokenizer is None else StreamDecoder(self.tokenizer, params.stop)
        seconds = {"vision_seconds": 0.0, "prefill_seconds": 0.0, "decode_seconds": 0.0}
        started = perf_counter()
        visual = self.encode([prompt])
        prompt = dataclasses.replace(prompt, images=())  # not needed any more
        seconds["vision_seconds"] = perf_counter() - started

        phase, started = "prefill_seconds", perf_counter()
        batch = self.batch([prompt], visual, budget)
        del visual  # the batch lets go of it after the prefill
        try:
            logits = batch.prefill(self.chunk_tokens)
            for count in range(1, budget + 1):
                sampled = sampler.sample(logits[0])
                fresh, reason = self._advance(text, sampled.token_id, params, count == budget)
                seconds[phase] += perf_counter() - started
                if reason is not None:
                    batch.release()  # before the reader sees the last piece: it may never come back for the end
                    usage = Usage(len(prompt.ids), prompt.image_tokens, count, **seconds)
                    yield Piece(fresh, (sampled.token_id,), (sampled,), reason, usage)
                    return
                yield Piece(fresh, (sampled.token_id,), (sampled,))
                phase, started = "decode_seconds", perf_counter()
                logits = batch.decode([sampled.token_id])
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


def require_positive(name: str, value: object) -> None:
    """Raises RequestError unless value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise RequestError(f"unsupported value {name} = {value!r} (allowed: a whole number, 1 or more)")


def _with_overrides(params: SamplingParams, overrides: dict[str, Any]) -> SamplingParams:
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    for name in overrides:
        if name not in known:
            raise RequestError(f"unsupported option {name} (supported: {', '.join(sorted(known))})")
    return dataclasses.replace(params, **overrides)
