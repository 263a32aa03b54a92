"""The ranges of input shapes that a plan is built for."""

from collections.abc import Mapping

import onnx_ir as ir

from moevlm.export.backends.tensorrt.options import Options

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, tuned for, largest
Profile = dict[str, Range]
Sizes = Mapping[str, tuple[int, int, int]]

# The mask of attention is patches squared: 16 MB, and half a GB of scores for 16 heads where no kernel fuses them.
MAX_PATCHES = 4096
USUAL_PATCHES = 1024


def decoder_profiles(decoder: ir.Model, options: Options) -> list[Profile]:
    """For prefill, chunks of prompts, and for decode, one token of each sequence."""
    prefill = {
        "batch": (1, 1, options.max_batch),
        "sequence": (1, options.chunk_tokens, options.chunk_tokens),
        "logits": (1, 1, options.max_logits),
        "visual": (1, min(options.chunk_tokens, options.max_visual), options.max_visual),
    }
    decode = {
        "batch": (1, 1, options.max_batch),
        "sequence": (1, 1, 1),
        "logits": (1, 1, options.max_batch),
        "visual": (1, 1, options.max_batch),
    }
    return [_profile(decoder, sizes) for sizes in (prefill, decode)]


def vision_profiles(vision: ir.Model, merge_size: int) -> list[Profile]:
    """For one packed call of any images; every image is a multiple of merge_size**2 patches."""
    unit = merge_size**2
    largest = max_patches(merge_size)
    sizes = {"patches": (unit, USUAL_PATCHES // unit * unit, largest), "starts": (2, 2, largest // unit + 1)}
    return [_profile(vision, sizes)]


def max_patches(merge_size: int) -> int:
    """Of all images of one call."""
    return MAX_PATCHES // merge_size**2 * merge_size**2


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
