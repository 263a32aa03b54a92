"""From a bundle on disk to a runtime: files verified first, then read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from moevlm.runtime.bundle import Bundle
from moevlm.runtime.chat import ChatTemplate, Tokenizer
from moevlm.runtime.errors import BundleError, EngineError
from moevlm.runtime.generate import Runtime
from moevlm.runtime.images import ImageProcessor
from moevlm.runtime.ort_engine import OrtEngine

Progress = Callable[[int, int], None]  # (bytes verified, bytes in total)


def load_runtime(
    path: str | os.PathLike[str],
    target: str | None = None,
    threads: int | None = None,
    chunk_tokens: int = 512,
    max_image_pixels: int | None = None,
    progress: Progress | None = None,
) -> Runtime:
    """See `moevlm.runtime.load`; progress is called while the engine's files are verified."""
    bundle = Bundle.open(os.fspath(path))
    tokenizer = Tokenizer(bundle.read_text("tokenizer.json"))
    template = ChatTemplate(bundle.read_text("chat_template.jinja"))
    engine = load_engine(bundle, target, threads, progress)
    images = load_images(bundle, max_image_pixels)
    return Runtime(bundle.manifest.model, tokenizer, template, engine, images, chunk_tokens=chunk_tokens)


def load_engine(
    bundle: Bundle, target: str | None = None, threads: int | None = None, progress: Progress | None = None
) -> OrtEngine:
    """One engine of the bundle, its files verified. Raises BundleError or EngineError."""
    if threads is not None and threads < 1:
        raise EngineError(f"unsupported value threads = {threads} (allowed: 1 or more)")
    name, engine = bundle.engine(target)
    bundle.verify(bundle.engine_files(name), progress)
    return OrtEngine(bundle.path(engine.vision), bundle.path(engine.decoder), bundle.manifest.model, threads)


def load_images(bundle: Bundle, max_pixels: int | None = None) -> ImageProcessor | None:
    """The bundle's image preprocessing; None if its checkpoint came without. Raises BundleError."""
    if "preprocessor.json" not in bundle.manifest.files:
        return None
    try:
        preprocessor = json.loads(bundle.read_text("preprocessor.json"))
    except ValueError as error:
        raise BundleError(f"preprocessor.json is not valid JSON: {error}") from None
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    return ImageProcessor(preprocessor, bundle.manifest.model.vision, **limit)
