"""Our engines: a target of a bundle that lies beside the checkpoint."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from bench.peers.protocol import System, Timed, arguments, serve
from moevlm.export.parity.batch import Batch, BatchLimits
from moevlm.runtime import AsyncEngine, Piece, SamplingParams
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_images, load_runtime
from moevlm.runtime.request.prompt import Prompt

CLIENTS_MEMORY = 2 << 30  # bytes


def bundle_of(checkpoint: Path, group_size: int) -> Path:
    """Where the benchmark builds the checkpoint's bundle with so many weights to a scale."""
    return checkpoint.with_suffix(f".group{group_size}.moevlm")


class MoevlmBundle(System):
    """Through the public runtime: what `moevlm run` does between tokenizer and detokenizer."""

    def __init__(self, bundle: Path, target: str, threads: int) -> None:
        from importlib.metadata import version

        self._runtime: Runtime = load_runtime(bundle, target, LoadOptions(threads))
        self._model = self._runtime.model
        self._images = load_images(Bundle.open(bundle))
        self.vocabulary = self._model.vocabulary
        self.versions = {name: version(name) for name in ("moevlm", "onnxruntime")}

    def prefill(self, ids: np.ndarray) -> Timed:
        started = perf_counter()
        return self._first(Prompt.from_ids(ids, [], self._model), started)

    def first_token(self, pixels: np.ndarray, ids: np.ndarray) -> Timed:
        if self._images is None:
            raise ValueError("the bundle has no preprocessor.json")
        source = Image.fromarray(pixels)
        started = perf_counter()
        layout = self._images.layout(source)
        pieces = self._images.fit(source)
        prompt = Prompt.from_ids([*layout.ids(self._model), *ids], layout.grids, self._model, pieces)
        return self._first(prompt, started)

    def decode(self, history: np.ndarray, steps: np.ndarray) -> Timed:
        batch = self._batch([Prompt.from_ids(row, [], self._model) for row in history], steps.shape[1])
        batch.prefill(self._runtime.chunk_tokens)
        started = perf_counter()
        for column in steps.T:
            chosen = batch.decode(column).argmax(-1)
        return perf_counter() - started, int(chosen[0])

    def clients(self, history: np.ndarray, tokens: int) -> Timed:
        prompts = [Prompt.from_ids(row, [], self._model) for row in history]
        runtime = Runtime(self._model, None, None, self._runtime.engine, cache_memory=CLIENTS_MEMORY)

        async def timed(new_tokens: int) -> Timed:
            async with AsyncEngine(runtime) as service:
                streams = [service.generate(prompt, params=_params(new_tokens)) for prompt in prompts]
                await asyncio.gather(*(anext(stream) for stream in streams))
                started = perf_counter()
                answers = await asyncio.gather(*(_rest(stream) for stream in streams))
                return perf_counter() - started, answers[0][-1]

        asyncio.run(timed(2))  # the prompts are known from now on
        return asyncio.run(timed(tokens + 1))

    def _first(self, prompt: Prompt, started: float) -> Timed:
        batch = self._batch([prompt], 1)
        chosen = int(batch.prefill(self._runtime.chunk_tokens)[0].argmax())
        return perf_counter() - started, chosen

    def _batch(self, prompts: list[Prompt], new_tokens: int) -> Batch:
        engine = self._runtime.engine
        limits = BatchLimits.of(prompts, engine.limits, new_tokens)
        return Batch(engine, self._model, prompts, self._runtime.encode(prompts), limits)


def _params(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)


async def _rest(stream: AsyncIterator[Piece]) -> list[int]:
    return [token async for piece in stream for token in piece.token_ids]


if __name__ == "__main__":
    given = arguments(__doc__)
    serve(lambda: MoevlmBundle(bundle_of(given.checkpoint, given.group_size), given.target, given.threads))
