"""The ranges of input shapes that an engine is built for."""

import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from moevlm.export.backends.tensorrt.options import Options
from moevlm.runtime.core.states import PAGE_SIZE, PagedKV, Recurrent, StateSpec
from moevlm.runtime.core.towers import VisionMetadata

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, tuned for, largest
Profile = dict[str, Range]
Sizes = Mapping[str, tuple[int, int, int]]

USUAL_PATCHES = 1024
SEVERAL_IMAGES = 4096  # patches of one call, at least, so that small images go through it together
MOST_PATCHES = 65536  # 16.7 megapixels in patches of 16 pixels
USUAL_PAGES = 1024
# Products of few rows take as long as reading the weights: what is tuned for 8 sequences does as well for one.
USUAL_SEQUENCES = 8
_CACHE_ELEMENTS = 1 << 31  # more than that TensorRT does not promise to take in a tensor


def decoder_profiles(decoder: ir.Model, options: Options, columns: int, pages: int, rows: int) -> list[Profile]:
    """For any step, and for decode, where each sequence has one token.

    columns: of a page table. pages: of a cache. rows: of a recurrent state, 0 for a model without.
    """
    most, usual = options.max_sequences, min(USUAL_SEQUENCES, options.max_sequences)
    tokens = (1, options.chunk_tokens, options.max_tokens)
    shared = {
        "starts": (2, usual + 1, most + 1),
        "sequences": (1, usual, most),
        "table": (1, columns, columns),
        "pages": (2, min(USUAL_PAGES, pages), pages),
        "rows": (2, min(usual + 1, rows), rows),
    }
    any_step = {"tokens": tokens, "visual": tokens, "logits": (1, usual, options.max_logits)}  # all may be of images
    decode = dict.fromkeys(("tokens", "logits", "visual"), (1, usual, most))
    return [_profile(decoder, shared | sizes) for sizes in (any_step, decode)]


def vision_profiles(vision: ir.Model, tower: VisionMetadata, patches: int) -> list[Profile]:
    """For one packed call of any images. patches: at most."""
    unit = tower.unit
    usual = max(1, min(USUAL_PATCHES, patches) // unit) * unit
    sizes = {"patches": (unit, usual, patches), "starts": (2, 2, tower.most_images(patches) + 1)}
    return [_profile(vision, sizes)]


def max_patches(unit: int, image_patches: int | None) -> int:
    """Of all images of one call, a multiple of `unit`.

    image_patches: of the largest image that the checkpoint's preprocessing makes.
    """
    most = min(image_patches or MOST_PATCHES, MOST_PATCHES)
    return max(most, SEVERAL_IMAGES, unit) // unit * unit


def max_pages(states: Iterable[StateSpec]) -> int:
    """Of each cache, page 0 included, which takes what padding writes."""
    return min(
        (_CACHE_ELEMENTS - 1) // (state.kv_heads * PAGE_SIZE * width)
        for state in states
        if isinstance(state, PagedKV)
        for width in state.widths.values()
    )


def max_rows(states: Iterable[StateSpec]) -> int:
    """Of each recurrent state, row 0 included, which is nobody's; 0 where there is none."""
    sizes = [math.prod(state.shape) for state in states if isinstance(state, Recurrent)]
    return min(((_CACHE_ELEMENTS - 1) // size for size in sizes), default=0)


def _profile(model: ir.Model, sizes: Sizes) -> Profile:
    """Inputs whose shapes are fixed need no range."""
    profile: Profile = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        if value.shape.is_static():
            continue
        ranges = [(d, d, d) if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        smallest, usual, largest = (tuple(r[i] for r in ranges) for i in range(3))
        profile[str(value.name)] = (smallest, usual, largest)
    return profile
