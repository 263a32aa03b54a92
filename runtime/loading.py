"""From a bundle on disk to a runtime: arguments checked first, small files read next, the engine verified last."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moevlm.runtime.backends.libraries import DOMAIN, instruction_set, operators_path
from moevlm.runtime.backends.ort.engine import OrtEngine
from moevlm.runtime.backends.ort.library import onnxruntime
from moevlm.runtime.backends.selection import select
from moevlm.runtime.bundle.file_hashes import Progress
from moevlm.runtime.bundle.graph_file import GraphFile
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.bundle.verified_file import BundleFile
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BundleError, EngineError, RequestError, require_positive, shown
from moevlm.runtime.core.json_object import json_object
from moevlm.runtime.core.manifest import EngineMetadata, TensorRTMetadata
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.protocol import Engine
from moevlm.runtime.perf.process_limits import cores, cpu_quota
from moevlm.runtime.request.chat import ChatTemplate
from moevlm.runtime.request.generation_file import GENERATION, released_sampling
from moevlm.runtime.request.images import ImageProcessor
from moevlm.runtime.request.tokenizer import Tokenizer


def load_runtime(
    path: str | os.PathLike[str],
    target: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
    chunk_tokens: int = defaults.CHUNK_TOKENS,
    max_image_pixels: int = defaults.MAX_IMAGE_PIXELS,
    progress: Progress | None = None,
    max_image_tokens: int | None = None,
) -> Runtime:
    """See `moevlm.runtime.load`; progress is called while the engine's files are verified."""
    require_cores(threads)
    require_positive("chunk_tokens", chunk_tokens)
    require_positive("max_image_pixels", max_image_pixels)
    if max_image_tokens is not None:
        require_positive("max_image_tokens", max_image_tokens)
    if not isinstance(spinning, bool):
        raise RequestError(f"unsupported value spinning = {shown(spinning)} (allowed: true or false)")
    if target is not None and not isinstance(target, str):
        raise RequestError(f"unsupported value target = {shown(target)} (allowed: the name of an engine)")
    bundle = Bundle.open(_directory(path))
    name, _ = select(bundle, target)
    vocabulary, template = (bundle.optional_text(file) for file in ("tokenizer.json", "chat_template.jinja"))
    tokenizer = None if vocabulary is None else Tokenizer(vocabulary)
    chat = None if template is None else ChatTemplate(template, bundle.manifest.template_variables)
    images = load_images(bundle, max_image_pixels, max_image_tokens)
    sampling = released_sampling(bundle.optional_text(GENERATION))
    engine = load_engine(bundle, name, threads, spinning, progress)
    return Runtime(
        bundle.manifest.model,
        tokenizer,
        chat,
        engine,
        images,
        chunk_tokens=chunk_tokens,
        target=name,
        sampling=sampling,
    )


def load_engine(
    bundle: Bundle,
    target: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
    progress: Progress | None = None,
) -> Engine:
    """One engine of the bundle, its files verified. Raises RequestError, BundleError or EngineError.

    threads, spinning: of engines on the CPU.
    """
    require_cores(threads)
    name, engine = select(bundle, target)
    if engine.tensorrt is not None:
        return _tensorrt_engine(bundle, name, engine, engine.tensorrt, progress)
    if threads is None and cpu_quota() is not None:
        threads = cores()  # ONNX Runtime counts the cores that it sees, not the time on them that it gets
    vision, decoder = open_graphs(bundle, name, progress)
    return OrtEngine(
        vision, decoder, bundle.manifest.model, engine, threads, spinning=spinning, operators=operators_for(engine)
    )


def require_library(engine: EngineMetadata) -> None:
    """Find out at once whether what the engine runs on is installed. Raises EngineError, naming what to install."""
    if engine.tensorrt is not None:
        from moevlm.runtime.backends.tensorrt.library import find_module

        find_module(engine.tensorrt)
        return
    onnxruntime()
    operators_for(engine)


def open_graphs(bundle: Bundle, name: str, progress: Progress | None = None) -> tuple[GraphFile, GraphFile]:
    """Vision and decoder graph of an engine on ONNX Runtime: every file opened once, hashed, and read or mapped.

    Raises BundleError or EngineError.
    """
    _, engine = bundle.engine(name)
    with _opened(bundle, name, (engine.vision, engine.decoder), progress) as files:
        vision, decoder = (
            GraphFile.of(bundle.directory, graph, bundle.read_bytes(graph), files)
            for graph in (engine.vision, engine.decoder)
        )
    return vision, decoder


def _tensorrt_engine(
    bundle: Bundle, name: str, engine: EngineMetadata, metadata: TensorRTMetadata, progress: Progress | None
) -> Engine:
    from moevlm.runtime.backends.tensorrt.engine import PlanFile, TensorRTEngine

    graphs = engine.vision, engine.decoder
    with _opened(bundle, name, graphs, progress) as files:
        experts = files[metadata.experts].map() if metadata.experts else None
    # Plans are native code: the very bytes that were checked go on, whatever happens to the files meanwhile.
    vision, decoder = (
        PlanFile(graph, bundle.read_bytes(graph), bundle.manifest.files[graph].sha256) for graph in graphs
    )
    return TensorRTEngine(vision, decoder, experts, bundle.manifest.model, engine)


@contextmanager
def _opened(
    bundle: Bundle, name: str, graphs: Container[str], progress: Progress | None
) -> Iterator[Mapping[str, BundleFile]]:
    """All files of an engine but its graphs, which are checked as they are read."""
    with ExitStack() as stack:
        files = bundle.open_verified([path for path in bundle.engine_files(name) if path not in graphs], progress)
        for file in files.values():
            stack.push(file)
        yield files


def operators_for(engine: EngineMetadata) -> Path | None:
    """The operator library that an engine needs; None if ONNX Runtime has all. Raises EngineError."""
    if engine.operators not in ("", DOMAIN):
        raise EngineError(f"the engine needs operators of {shown(engine.operators)} (there are: {DOMAIN})")
    if not engine.operators:
        return None
    instruction_set()
    return operators_path()


def load_images(
    bundle: Bundle, max_pixels: int = defaults.MAX_IMAGE_PIXELS, max_tokens: int | None = None
) -> ImageProcessor | None:
    """The bundle's image preprocessing; None if its checkpoint came without. Raises BundleError."""
    if "preprocessor.json" not in bundle.manifest.files:
        return None
    preprocessor = json_object(bundle.read_text("preprocessor.json"), "preprocessor.json", BundleError)
    return ImageProcessor(preprocessor, bundle.manifest.model.vision, max_pixels, max_tokens)


def _directory(path: str | os.PathLike[str]) -> str:
    """A path that the system can be asked for."""
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    try:
        if isinstance(name, str) and b"\0" not in os.fsencode(name):
            return name
    except UnicodeEncodeError:
        pass
    raise RequestError(f"unsupported value path = {shown(path)} (allowed: the path of a bundle, as text)")


def require_cores(threads: int | None) -> None:
    """Raises RequestError for more threads than this process has cores."""
    most = cores()
    good = isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= most
    if threads is not None and not good:
        raise RequestError(f"unsupported value threads = {shown(threads)} (allowed: 1 to {most}, this process's cores)")
