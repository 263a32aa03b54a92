"""Loads a bundle and generates text.

runtime = moevlm.runtime.load("demo.moevlm")
for piece in runtime.generate([{"role": "user", "content": "Translate to Chinese: forty-two"}]):
    print(piece.text, end="")

An answer ends after max_new_tokens, 256 by default; every option is a field of SamplingParams. Where none is given the
model's own sampling counts, `runtime.sampling`; temperature=0 is greedy. Threads may share one Runtime: requests that
run at the same time share steps, and a prompt that begins as an earlier one did goes on from there. generate_many()
answers a list of requests, AsyncEngine serves an event loop. Images are pathlib.Path objects, encoded
bytes, binary files, Pillow images or arrays: text never names a file.

generate() decodes the images and returns an Answer, whose first piece encodes them and reads the prompt: an event loop
calls both in a thread. Whoever leaves before the last piece closes the answer, which frees its cache; any thread may
call its cancel() or close(), also while another waits for the next piece.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moevlm.runtime.core import defaults
from moevlm.runtime.core.experts_in import DEVICE

if TYPE_CHECKING:
    from moevlm.runtime.core.errors import (
        BundleError,
        Cancelled,
        DeadlineExceeded,
        EngineError,
        MoevlmError,
        QueueFull,
        RequestError,
    )
    from moevlm.runtime.engine.answer import Answer, Completion, Piece, Usage
    from moevlm.runtime.engine.async_engine import AsyncEngine
    from moevlm.runtime.engine.generate import Runtime
    from moevlm.runtime.request.prompt import Prompt
    from moevlm.runtime.request.sampling import SamplingParams

# Imported when they are first asked for, so that importing this package stays quick.
_HOMES = {
    "Answer": "engine.answer",
    "AsyncEngine": "engine.async_engine",
    "BundleError": "core.errors",
    "Cancelled": "core.errors",
    "Completion": "engine.answer",
    "DeadlineExceeded": "core.errors",
    "EngineError": "core.errors",
    "MoevlmError": "core.errors",
    "Piece": "engine.answer",
    "Prompt": "request.prompt",
    "QueueFull": "core.errors",
    "RequestError": "core.errors",
    "Runtime": "engine.generate",
    "SamplingParams": "request.sampling",
    "Usage": "engine.answer",
}
__all__ = [
    "Answer",
    "AsyncEngine",
    "BundleError",
    "Cancelled",
    "Completion",
    "DeadlineExceeded",
    "EngineError",
    "MoevlmError",
    "Piece",
    "Prompt",
    "QueueFull",
    "RequestError",
    "Runtime",
    "SamplingParams",
    "Usage",
    "load",
]


def load(
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    threads: int | None = None,
    spinning: bool = True,
    chunk_tokens: int | None = None,
    max_image_pixels: int = defaults.MAX_IMAGE_PIXELS,
    max_image_tokens: int | None = None,
    cache_memory: int | None = None,
    experts_in: str = DEVICE,
) -> Runtime:
    """Open a bundle, check the hashes of everything that will be used, and load one engine.

    target: the engine's name, or its beginning up to a colon. Of several that run here the first counts in this order:
    engines for this machine's GPU, cpu, ort-cpu, reference; of one kind int8, unrounded, fp8, int4. `Runtime.target`
    says which it is.
    threads: for one operator on the CPU, by default all cores.
    spinning: threads wait for the next operator awake, which is faster, and takes the cores from other processes.
    chunk_tokens: the most prompt tokens in one step, by default 512, and on a GPU what the engine was built for.
    max_image_pixels: larger images are refused.
    max_image_tokens: the most for an image; larger ones are resized. Without it the checkpoint's own limit holds, often
    16,384 tokens, of which a photo from a phone takes most; a request may ask for less.
    cache_memory: bytes for what requests keep between steps. Without it a quarter of the memory that is free, taken as
    it is first used; of a GPU's all that is free, taken at once. Never more than the requests of a step can use at full
    length: 32 on a CPU, on a GPU as many as the engine was built for.
    experts_in: of an engine on a GPU with less memory than the model needs: "host" leaves the experts' weights in the
    memory of the host, where the GPU reads them over its link, which is slow; "host:N" those of N layers.
    Raises RequestError for an argument that is not allowed, BundleError for a bundle that is missing, damaged or
    without that engine, and EngineError for an engine that does not load here.
    """
    from moevlm.runtime.load_options import LoadOptions
    from moevlm.runtime.loading import load_runtime

    options = LoadOptions(threads, spinning, chunk_tokens, max_image_pixels, max_image_tokens, cache_memory, experts_in)
    return load_runtime(path, target, options)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("moevlm")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"moevlm.runtime.{_HOMES[name]}"), name)
