"""How long one request takes on an engine, stage by stage: images, prompt, and each further token."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
from PIL import Image

from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.perf.latency_report import LatencyReport, Limit, Seconds
from moevlm.runtime.perf.limits import decode_work, limit, prefill_work, vision_work
from moevlm.runtime.perf.machine import GpuMachine, Machine
from moevlm.runtime.request.images.processor import ImageProcessor
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampling import SamplingParams


def random_prompt(
    model: ModelMetadata, images: ImageProcessor | None, text_tokens: int, image_size: int, seed: int = 0
) -> Prompt:
    """A random square image of image_size pixels a side (0: none), then random text. Raises RequestError."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(np.setdiff1d(np.arange(model.vocabulary), model.visual_token_ids), text_tokens)
    if not image_size:
        return Prompt.from_ids(ids, [], model)
    if model.vision is None:
        raise RequestError(f"{model.model_type} takes text alone: measure without an image (--image-size 0)")
    if images is None:
        raise RequestError("the bundle has no preprocessor.json: measure without an image (--image-size 0)")
    image = Image.fromarray(rng.integers(0, 256, (image_size, image_size, 3), np.uint8))
    layout = images.layout(image)
    return Prompt.from_ids([*layout.ids(model), *ids], layout.grids, model, images.fit(image))


def measure(
    target: str,
    engine: EngineMetadata,
    load: Callable[[], Runtime],
    prompt: Prompt,
    new_tokens: int,
    repeats: int,
    machine: Machine | GpuMachine | None,
    threads: int | None,
    progress: Callable[[int, int], None],
) -> LatencyReport:
    """Medians over `repeats` requests after one that does not count.

    load: makes the runtime, and is timed too. machine: for the limits; None to leave them out.
    """
    started = perf_counter()
    requests = []
    with load() as runtime:
        load_seconds = perf_counter() - started
        for repeat in range(repeats + 1):
            requests.append(_request(runtime, prompt, new_tokens))
            progress(repeat + 1, repeats + 1)
        graphs = getattr(runtime.engine, "graphs", None)  # of engines on a GPU
    vision, prefill, decode = (list(stage) for stage in zip(*requests[1:], strict=True))
    limits = _limits(runtime.model, engine, machine, prompt, new_tokens, *map(median, (vision, prefill, decode)))
    return LatencyReport(
        target=target,
        threads=threads,
        graphs=graphs,
        load_seconds=load_seconds,
        vision=_seconds(vision) if prompt.images else None,
        prefill=_seconds(prefill),
        decode_token=_seconds(decode),
        first_token=_seconds([a + b for a, b in zip(vision, prefill, strict=True)]),
        decode_tokens_per_second=1 / median(decode),
        prefill_tokens_per_second=len(prompt.ids) / median(prefill),
        **limits,
    )


def _limits(
    model: ModelMetadata,
    engine: EngineMetadata,
    machine: Machine | GpuMachine | None,
    prompt: Prompt,
    new_tokens: int,
    vision: float,
    prefill: float,
    decode: float,
) -> dict[str, Limit]:
    """Of the stages that there are, by their names in the report; none without a machine or in an older bundle.

    On a GPU that of a token alone, which memory bounds: prompts and images are bound by what is not measured.
    """
    cost = engine.cost
    if machine is None or cost is None:
        return {}
    works = {"decode_limit": (decode_work(model, engine, cost, len(prompt.ids) + new_tokens // 2), decode)}
    if isinstance(machine, Machine):
        works["prefill_limit"] = prefill_work(model, cost, len(prompt.ids)), prefill
        if prompt.images:
            patches = [image.width * image.height // model.tower.patch_size**2 for image in prompt.images]
            works["vision_limit"] = vision_work(cost, patches), vision
    return {name: limit(work, machine, engine, seconds) for name, (work, seconds) in works.items()}


def _request(runtime: Runtime, prompt: Prompt, new_tokens: int) -> tuple[float, float, float]:
    """Seconds for the image, for the prompt, and for one further token (the median of new_tokens - 1)."""
    runtime.forget()  # else the prompt would be read once only
    stream = runtime.generate(prompt, params=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    times, usage = [], None
    for piece in stream:
        times.append(perf_counter())
        usage = piece.usage
    assert usage is not None  # the last piece has it
    return usage.vision_seconds, usage.prefill_seconds, float(np.median(np.diff(times)))


def _seconds(values: list[float]) -> Seconds:
    return Seconds(median=median(values), minimum=min(values), maximum=max(values))
