"""From a bundle on disk to a runtime: arguments checked first, small files read next, the engine verified last."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from moevlm.runtime.backends.base import EngineOptions
from moevlm.runtime.backends.registry import backend_of
from moevlm.runtime.backends.selection import select
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError, RefusedOption
from moevlm.runtime.core.json_object import json_object
from moevlm.runtime.core.progress import Stages
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.perf.process_limits import available_memory, cores, cpu_quota
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.generation_file import GENERATION, released_sampling
from moevlm.runtime.request.images.fields import VIDEO_FILE
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.prompt_builder import PromptBuilder, no_messages
from moevlm.runtime.request.tokenizer import Tokenizer
from moevlm.runtime.request.videos.processor import VideoProcessor
from moevlm.runtime.request.videos.registry import video_processor


def load_runtime(
    path: str | os.PathLike[str],
    target: str | None = None,
    options: LoadOptions | None = None,
    progress: Stages | None = None,
    first: Callable[[PromptBuilder], None] | None = None,
) -> Runtime:
    """See `moevlm.runtime.load`; progress is told what takes long: files are verified, steps prepared.

    first: is called before the engine is loaded, which may take minutes, so that a request can be refused before that.
    """
    options = options or LoadOptions()
    if target is not None and not isinstance(target, str):
        raise RefusedOption("target", target, "the name of an engine")
    bundle = Bundle.open(_directory(path))
    name, _ = select(bundle, target)
    vocabulary, template = (bundle.optional_text(file) for file in ("tokenizer.json", "chat_template.jinja"))
    tokenizer = None if vocabulary is None else Tokenizer(vocabulary)
    chat = None if template is None else ChatTemplate(template, bundle.manifest.template_variables)
    images = load_images(bundle, options.max_image_pixels, options.max_image_tokens)
    videos = load_videos(bundle, images)
    sampling = released_sampling(bundle.optional_text(GENERATION))
    if first is not None:
        if tokenizer is None or chat is None:
            raise no_messages(tokenizer)
        first(PromptBuilder(bundle.manifest.model, tokenizer, chat, images, videos))
    engine = load_engine(bundle, name, options.engine, progress)
    cache_memory = options.cache_memory
    if cache_memory is None and engine.limits.cache_memory is None and (free := available_memory()) is not None:
        cache_memory = int(free * defaults.CACHE_SHARE)
    return Runtime(
        bundle.manifest.model,
        tokenizer,
        chat,
        engine,
        images,
        videos,
        chunk_tokens=options.chunk_tokens,
        target=name,
        sampling=sampling,
        cache_memory=cache_memory,
    )


def load_engine(
    bundle: Bundle,
    target: str | None = None,
    options: EngineOptions | None = None,
    progress: Stages | None = None,
) -> Engine:
    """One engine of the bundle, its files verified. Raises BundleError or EngineError."""
    options = options or EngineOptions()
    name, engine = select(bundle, target)
    if options.threads is None and cpu_quota() is not None:
        # ONNX Runtime counts the cores that it sees, not the time on them that it gets.
        options = replace(options, threads=cores())
    return backend_of(engine).load(bundle, name, options, progress)


def load_images(
    bundle: Bundle, max_pixels: int = defaults.MAX_IMAGE_PIXELS, max_tokens: int | None = None
) -> ImageProcessor | None:
    """The bundle's image preprocessing; None if its checkpoint came without. Raises BundleError."""
    vision = bundle.manifest.model.vision
    if vision is None or "preprocessor.json" not in bundle.manifest.files:
        return None
    preprocessor = json_object(bundle.read_text("preprocessor.json"), "preprocessor.json", BundleError)
    return image_processor(preprocessor, vision, max_pixels, max_tokens)


def load_videos(bundle: Bundle, images: ImageProcessor | None) -> VideoProcessor | None:
    """The bundle's video preprocessing; None if its model or its checkpoint has none. Raises BundleError."""
    if images is None or bundle.manifest.model.video is None or VIDEO_FILE not in bundle.manifest.files:
        return None
    preprocessor = json_object(bundle.read_text(VIDEO_FILE), VIDEO_FILE, BundleError)
    return video_processor(preprocessor, bundle.manifest.model.tower, images)


def _directory(path: str | os.PathLike[str]) -> str:
    """A path that the system can be asked for."""
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    try:
        if isinstance(name, str) and b"\0" not in os.fsencode(name):
            return name
    except UnicodeEncodeError:
        pass
    raise RefusedOption("path", path, "the path of a bundle, as text")
