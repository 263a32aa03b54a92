"""Limits of the values in a manifest: the runtime computes with them before an engine could object."""

from collections.abc import Iterator
from typing import Any

from moevlm.runtime.core.errors import BundleError, shown
from moevlm.runtime.core.manifest import CACHE_BYTES, Manifest, TensorRTMetadata

_SIZE = (1, 1 << 20)
_TOKENS = (1, 1 << 30)
_ID = (0, (1 << 31) - 1)
_COUNT = (0, 1 << 62)
_THETA = (1e-3, 1e30)
_MODEL: dict[str, tuple[float, float]] = {
    "hidden": _SIZE,
    "layers": (1, 1 << 14),
    "heads": (1, 1 << 16),
    "kv_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "vocabulary": (1, 1 << 26),
    "context": _TOKENS,
    "experts": (1, 1 << 16),
    "top_k": (1, 1 << 16),
    "rope.dim": (2, 1 << 16),
    "rope.theta": _THETA,
    "vision.patch_size": (1, 1 << 10),
    "vision.temporal_patch_size": (1, 1 << 6),
    "vision.merge_size": (1, 1 << 6),
    "vision.channels": (1, 1 << 4),
    "vision.head_dim": (2, 1 << 16),
    "vision.rope_theta": _THETA,
    "vision.position_grid": (1, 1 << 14),
    "vision.deepstack": (0, 1 << 10),
}
_PLANS: dict[str, tuple[float, float]] = {
    "max_batch": _SIZE,
    "chunk_tokens": _TOKENS,
    "max_logits": _TOKENS,
    "capacity": _TOKENS,
    "max_visual": _TOKENS,
    "max_patches": _TOKENS,
}
_PATCH_VALUES = 1 << 22  # numbers of one patch
_RESAMPLINGS = ("bicubic", "bilinear")


def check_facts(manifest: Manifest) -> None:
    """Raise BundleError, naming the field, its value and what is allowed, for a number that no model has."""
    for field, value, allowed in _refused(manifest):
        raise BundleError(f"unsupported value in manifest.json: {field} = {shown(value)} (allowed: {allowed})")


def _refused(manifest: Manifest) -> Iterator[tuple[str, Any, str]]:
    """(field, value, what is allowed) of every value that is not."""
    model = manifest.model
    yield from _outside("model", model, _MODEL)
    for field, ids, (low, high) in (
        ("eos_token_ids", model.eos_token_ids, _ID),
        ("image_token_id", (model.image_token_id,), (0, model.vocabulary - 1)),
        ("dense_layers", model.dense_layers, (0, model.layers - 1)),
    ):
        for number in ids:
            if not low <= number <= high:
                yield f"model.{field}", number, f"{low} to {high}"
    rope, vision = model.rope, model.vision
    if model.heads % model.kv_heads:
        yield "model.kv_heads", model.kv_heads, f"a divisor of heads = {model.heads}"
    if model.top_k > model.experts:
        yield "model.top_k", model.top_k, f"up to experts = {model.experts}"
    if rope.dim > model.head_dim:
        yield "model.rope.dim", rope.dim, f"up to head_dim = {model.head_dim}"
    pairs = (rope.dim + 1) // 2
    if min(rope.sections) < 0 or not rope.dim // 2 <= sum(rope.sections) <= pairs:
        yield "model.rope.sections", list(rope.sections), f"three numbers that add up to dim / 2 = {pairs}"
    if vision.position_resampling not in _RESAMPLINGS:
        yield "model.vision.position_resampling", vision.position_resampling, ", ".join(_RESAMPLINGS)
    patch = vision.channels * vision.temporal_patch_size * vision.patch_size**2
    if patch > _PATCH_VALUES:
        yield "model.vision.patch_size", vision.patch_size, f"patches of up to {_PATCH_VALUES} numbers"
    for name, engine in manifest.engines.items():
        where = f"engines.{name}"
        yield from _outside(where, engine, {"block_size": (0, 1 << 16), "pruned_weights": _COUNT})
        if engine.kv_cache not in CACHE_BYTES:
            yield f"{where}.kv_cache", engine.kv_cache, ", ".join(CACHE_BYTES)
        if engine.cost is not None:
            yield from _outside(f"{where}.cost", engine.cost, dict.fromkeys(engine.cost.__struct_fields__, _COUNT))
        if engine.tensorrt is not None:
            yield from _plans(f"{where}.tensorrt", engine.tensorrt)


def _plans(where: str, metadata: TensorRTMetadata) -> Iterator[tuple[str, Any, str]]:
    yield from _outside(where, metadata, _PLANS)
    if not metadata.sms or not all(10 <= sm < 1000 for sm in metadata.sms):
        yield f"{where}.sms", list(metadata.sms), "one or more numbers like 86 for compute capability 8.6"


def _outside(where: str, metadata: Any, ranges: dict[str, tuple[float, float]]) -> Iterator[tuple[str, Any, str]]:
    for field, (low, high) in ranges.items():
        value = metadata
        for part in field.split("."):
            value = getattr(value, part)
        if not low <= value <= high:  # NaN is not, either
            yield f"{where}.{field}", value, f"{low:g} to {high:g}" if isinstance(high, float) else f"{low} to {high}"
