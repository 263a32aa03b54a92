"""What a model is, as `moevlm inspect` and `moevlm build --dry-run` show it: in the words of `moevlm families`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from moevlm.runtime.core.manifest import LayerMetadata, ModelMetadata, RopeMetadata
from moevlm.runtime.core.printable import count_text, counted

_TOWERS = {
    "grid": "packed grid",
    "moon": "packed grid, MoonViT",
    "pooled": "packed grid, pooled",
    "queries": "packed grid, as many visual tokens for every image, by cross-attention",
    "resampled": "packed grid, resampler",
    "rotary": "packed grid, rotary positions alone",
    "tiles": "tiles of one size and an overview",
}


def model_rows(model: ModelMetadata) -> list[tuple[str, str]]:
    """Pairs of a word and what there is to say."""
    sizes = f", {count_text(model.parameters)} parameters, {count_text(model.active_parameters)} active for a token"
    return [
        ("model", model.model_type + (sizes if model.parameters else "")),
        ("layers", _layers(model)),
        ("attention", _by_layers(map(_attention, model.layers))),
        ("routing", _by_layers(map(_routing, model.layers))),
        ("images", _images(model)),
        ("vocabulary", f"{model.vocabulary:,} tokens, context {model.context:,}"),
    ]


def _layers(model: ModelMetadata) -> str:
    """48 of width 2048; interleaved M-RoPE, scaled rope"""
    interleaved = any(rope.interleaved for rope in model.ropes)
    facts = {
        "interleaved M-RoPE" if interleaved else "M-RoPE": any(rope.sections for rope in model.ropes),
        "scaled rope": any(map(_is_scaled, model.ropes)),
        "queries scaled by their place": model.query_scale is not None,
    }
    words = ", ".join(word for word, true in facts.items() if true)
    return f"{len(model.layers)} of width {model.hidden}" + (f"; {words}" if words else "")


def _is_scaled(rope: RopeMetadata) -> bool:
    """Whether its frequencies or its factor are others than theta's; a frequency of 0 only leaves out a dimension."""
    theirs = ((found, rope.theta ** (-2 * i / rope.dim)) for i, found in enumerate(rope.frequencies) if found)
    return rope.factor != 1 or not all(math.isclose(*pair, rel_tol=1e-5) for pair in theirs)


def _by_layers(texts: Iterable[str]) -> str:
    """The text of all layers; where they differ, how many layers each is of."""
    kinds = Counter(texts)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{counted(count, 'layer')}: {text}" for text, count in kinds.items())


def _attention(layer: LayerMetadata) -> str:
    """GQA with q/k norms, 32 heads on 4 key-value heads of 128, window 512"""
    if not layer.heads:
        return layer.mixer or "none"
    size = str(layer.key_dim) if layer.value_dim == layer.key_dim else f"{layer.key_dim} and {layer.value_dim}"
    facts = [
        layer.mixer,
        f"{counted(layer.heads, 'head')} on {counted(layer.kv_heads, 'key-value head')} of {size}",
        f"window {layer.window}" if layer.window else "",
        f"chunks of {layer.chunk}" if layer.chunk else "",
        "an image's tokens see each other" if layer.bidirectional_images else "",
    ]
    return ", ".join(filter(None, facts))


def _routing(layer: LayerMetadata) -> str:
    """top 8 of 128 experts (softmax, renormalised)"""
    if not layer.experts:
        return "dense"
    return f"top {layer.top_k} of {layer.experts} experts" + (f" ({layer.routing})" if layer.routing else "")


def _images(model: ModelMetadata) -> str:
    """packed grid, patches of 16 pixels, 4 of them a token, 3 deepstack levels; videos, too"""
    tower = model.vision
    if tower is None:
        return "none"
    facts = [_TOWERS[str(tower.__struct_config__.tag)], f"patches of {tower.patch_size} pixels"]
    facts.append(f"{tower.queries} tokens each" if tower.queries else f"{tower.merge_size**2} of them a token")
    facts += [counted(model.deepstack, "deepstack level")] if model.deepstack else []
    return ", ".join(facts) + ("; videos, too" if model.video is not None else "")
