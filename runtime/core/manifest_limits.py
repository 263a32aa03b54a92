"""Limits of the values in a manifest: the runtime computes with them before an engine could object."""

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from moevlm.runtime.core.engine_metadata import TensorRTMetadata
from moevlm.runtime.core.errors import BundleError, shown
from moevlm.runtime.core.manifest import LayerMetadata, Manifest, RopeMetadata
from moevlm.runtime.core.states import STATE_DTYPES, PagedKV, StateSpec

_SIZE = (1, 1 << 20)
_TOKENS = (1, 1 << 30)
_ID = (0, (1 << 31) - 1)
_MOST_ERROR = 2  # of weights, relative: rounding to 0 is 1
_COUNT = (0, 1 << 62)
_THETA = (1e-3, 1e30)
_MODEL: dict[str, tuple[float, float]] = {
    "hidden": _SIZE,
    "vocabulary": (1, 1 << 26),
    "context": _TOKENS,
}
_LAYERS = (1, 1 << 14)
_WINDOW = (0, 1 << 30)
_LAYER: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("heads", "kv_heads", "key_dim", "value_dim", "experts", "top_k"), (0, 1 << 16)),
    **dict.fromkeys(("window", "chunk"), _WINDOW),
}
_ROPE: dict[str, tuple[float, float]] = {"dim": (2, 1 << 16), "theta": _THETA, "factor": (1e-3, 1e3)}
_FREQUENCY = 1 << 20
_IDS = 64  # in one list: each image and video of a prompt has them, some for each row
_ROPES = (1, 1 << 10)
_QUERY_SCALE: dict[str, tuple[float, float]] = {"beta": (0.0, 1e3), "original": _TOKENS, "offset": (0, 1 << 30)}
_PAGED: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("kv_heads", "key_dim", "value_dim"), (1, 1 << 16)),
    **dict.fromkeys(("window", "chunk"), _WINDOW),
}
_ELEMENTS = 1 << 40  # of a recurrent state
_PLANS: dict[str, tuple[float, float]] = {
    "max_sequences": _SIZE,
    **dict.fromkeys(("max_tokens", "max_logits"), _TOKENS),
    "workspace": _COUNT,
    "max_pages": (2, _TOKENS[1]),  # one is for padding
    "max_rows": _COUNT,
}


def check_metadata(manifest: Manifest) -> None:
    """Raise BundleError, naming the field, its value and what is allowed, for a number that no model has."""
    for field, value, allowed in _refused(manifest):
        raise BundleError(f"unsupported value in manifest.json: {field} = {shown(value)} (allowed: {allowed})")


def _refused(manifest: Manifest) -> Iterator[tuple[str, Any, str]]:
    """(field, value, what is allowed) of every value that is not."""
    model = manifest.model
    yield from _outside("model", model, _MODEL)
    known, video = (0, model.vocabulary - 1), model.video
    for field, ids, (low, high) in (
        ("eos_token_ids", model.eos_token_ids, _ID),
        ("image_token_id", () if model.image_token_id is None else (model.image_token_id,), known),
        *((f"image_marks.{mark}", ids, known) for mark, ids in msgspec.structs.asdict(model.image_marks).items()),
        ("video.placeholder", () if video is None else (video.placeholder,), known),
        ("video.token_id", () if video is None else (video.token_id,), known),
        ("video.begin", () if video is None else video.begin, known),
        ("video.end", () if video is None else video.end, known),
    ):
        if len(ids) > _IDS:
            yield f"the number of model.{field}", len(ids), f"0 to {_IDS}"
        for number in ids:
            if not low <= number <= high:
                yield f"model.{field}", number, f"{low} to {high}"
    for field, entries, (low, high) in (("layers", model.layers, _LAYERS), ("ropes", model.ropes, _ROPES)):
        if not low <= len(entries) <= high:
            yield f"the number of model.{field}", len(entries), f"{low} to {high}"
    for i, layer in enumerate(model.layers):
        yield from _layer(f"model.layers[{i}]", layer)
    widest = max(layer.key_dim for layer in model.layers)
    for i, rope in enumerate(model.ropes):
        yield from _rope(f"model.ropes[{i}]", rope, widest)
    if model.query_scale is not None:
        yield from _outside("model.query_scale", model.query_scale, _QUERY_SCALE)
    if (model.vision is None) != (model.image_token_id is None):
        yield "model.image_token_id", model.image_token_id, "null without model.vision, else a token id"
    if model.vision is not None:
        yield from _outside("model.vision", model.vision, model.vision.LIMITS)
        for field, value, allowed in model.vision.refused():
            yield f"model.vision.{field}", value, allowed
    for name, engine in manifest.engines.items():
        where = f"engines.{name}"
        if bool(engine.vision) != (model.vision is not None):
            yield f"{where}.vision", engine.vision, "a graph with model.vision, else nothing"
        yield from _outside(where, engine, {
            "group_size": (0, 1 << 16),
            "page_size": (0, 1 << 16),
            "pruned_weights": _COUNT,
        })  # fmt: skip
        for fate, error in engine.weight_errors.items():
            if not 0 <= error <= _MOST_ERROR:
                yield f"{where}.weight_errors[{fate!r}]", error, f"0 to {_MOST_ERROR}"
        if engine.page_size and engine.page_size & (engine.page_size - 1):
            yield f"{where}.page_size", engine.page_size, "0, or a power of two"
        for i, state in enumerate(engine.states):
            yield from _state(f"{where}.states[{i}]", state, len(model.layers))
        if engine.cost is not None:
            yield from _outside(f"{where}.cost", engine.cost, dict.fromkeys(engine.cost.__struct_fields__, _COUNT))
        if engine.tensorrt is not None:
            yield from _plans(f"{where}.tensorrt", engine.tensorrt, images=model.vision is not None)


def _layer(where: str, layer: LayerMetadata) -> Iterator[tuple[str, Any, str]]:
    yield from _outside(where, layer, _LAYER)
    if layer.heads and (not 1 <= layer.kv_heads <= layer.heads or layer.heads % layer.kv_heads):
        yield f"{where}.kv_heads", layer.kv_heads, f"a divisor of heads = {layer.heads}"
    if layer.top_k > layer.experts or (layer.experts and not layer.top_k):
        yield f"{where}.top_k", layer.top_k, f"1 to experts = {layer.experts}" if layer.experts else "0 without experts"


def _rope(where: str, rope: RopeMetadata, widest: int) -> Iterator[tuple[str, Any, str]]:
    yield from _outside(where, rope, _ROPE)
    if rope.dim > widest:
        yield f"{where}.dim", rope.dim, f"up to the largest key_dim = {widest}"
    pairs = (rope.dim + 1) // 2
    covered = rope.dim // 2 <= sum(rope.sections) <= pairs
    if rope.sections and (len(rope.sections) != 3 or min(rope.sections) < 0 or not covered):
        yield f"{where}.sections", list(rope.sections), f"none, or three numbers that add up to dim / 2 = {pairs}"
    if rope.frequencies and len(rope.frequencies) != pairs:
        yield f"the number of {where}.frequencies", len(rope.frequencies), f"0 or dim / 2 = {pairs}"
    for i, frequency in enumerate(rope.frequencies):
        if not 0 <= frequency <= _FREQUENCY:
            yield f"{where}.frequencies[{i}]", frequency, f"0 to {_FREQUENCY}"


def _state(where: str, state: StateSpec, layers: int) -> Iterator[tuple[str, Any, str]]:
    yield from _outside(where, state, {"layer": (0, layers - 1)})
    if state.dtype not in STATE_DTYPES:
        yield f"{where}.dtype", state.dtype, ", ".join(STATE_DTYPES)
    if isinstance(state, PagedKV):
        yield from _outside(where, state, _PAGED)
    elif not state.shape or min(state.shape) < 1 or math.prod(state.shape) > _ELEMENTS:
        yield f"{where}.shape", list(state.shape), f"sizes of 1 or more, up to {_ELEMENTS} elements"


def _plans(where: str, metadata: TensorRTMetadata, images: bool) -> Iterator[tuple[str, Any, str]]:
    yield from _outside(where, metadata, _PLANS)
    yield from _outside(where, metadata, dict.fromkeys(("max_visual", "max_patches"), (int(images), _TOKENS[1])))
    if not metadata.sms or not all(10 <= sm < 1000 for sm in metadata.sms):
        yield f"{where}.sms", list(metadata.sms), "one or more numbers like 86 for compute capability 8.6"


def _outside(where: str, metadata: Any, ranges: dict[str, tuple[float, float]]) -> Iterator[tuple[str, Any, str]]:
    for field, (low, high) in ranges.items():
        value = metadata
        for part in field.split("."):
            value = getattr(value, part)
        if not low <= value <= high:  # NaN is not, either
            yield f"{where}.{field}", value, f"{low:g} to {high:g}" if isinstance(high, float) else f"{low} to {high}"
