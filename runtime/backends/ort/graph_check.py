"""Checks at load that two graphs are the vision tower and the decoder of the manifest's model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import SCALE_BYTES, ModelMetadata

_FLOAT, _INT64, _INT8 = "tensor(float)", "tensor(int64)", "tensor(int8)"
_TAPS = {"bilinear": 4, "bicubic": 16}  # rows of the position table for a patch

# Dtype as ONNX Runtime names it, and sizes; None for one that differs from step to step.
Shape = tuple[str, tuple[int | None, ...]]


def check_vision_graph(session: Any, model: ModelMetadata) -> None:
    """Raise EngineError unless an InferenceSession takes and gives what the model's vision tower does."""
    vision = model.vision
    width = vision.channels * vision.temporal_patch_size * vision.patch_size**2
    taps, pairs = _TAPS[vision.position_resampling], 2 * ((vision.head_dim // 2 + 1) // 2)
    _require("vision", "input", session.get_inputs(), {
        "pixel_patches": (_FLOAT, (None, width)),
        "position_index": (_INT64, (None, taps)),
        "position_weight": (_FLOAT, (None, taps)),
        "rope_cos": (_FLOAT, (None, pairs)),
        "rope_sin": (_FLOAT, (None, pairs)),
        "segment_id": (_INT64, (None,)),
    })  # fmt: skip
    _require("vision", "output", session.get_outputs(), _features(model))


def check_decoder_graph(session: Any, model: ModelMetadata) -> np.dtype:
    """The dtype of the KV cache. Raises EngineError as `check_vision_graph`; more outputs are allowed."""
    inputs = {value.name: value for value in session.get_inputs()}
    on_bytes = "key_cache.0" in inputs and inputs["key_cache.0"].type == _INT8
    width = model.head_dim + (SCALE_BYTES if on_bytes else 0)
    cache: Shape = (_INT8 if on_bytes else _FLOAT, (None, model.kv_heads, None, width))
    kinds = [f"{kind}_cache{{}}.{i}" for i in range(model.layers) for kind in ("key", "value")]
    pairs = (model.rope.dim + 1) // 2
    _require("decoder", "input", inputs.values(), {
        "input_ids": (_INT64, (None, None)),
        "visual_index": (_INT64, (None, None)),
        "rope_cos": (_FLOAT, (None, None, pairs)),
        "rope_sin": (_FLOAT, (None, None, pairs)),
        "cache_position": (_INT64, (None,)),
        "logits_index": (_INT64, (None,)),
        **_features(model),
        **{kind.format(""): cache for kind in kinds},
    })  # fmt: skip
    outputs = {"logits": (_FLOAT, (None, model.vocabulary)), **{kind.format("_out"): cache for kind in kinds}}
    given = [value for value in session.get_outputs() if value.name in outputs]
    _require("decoder", "output", given, outputs)
    return np.dtype(np.int8 if on_bytes else np.float32)


def _features(model: ModelMetadata) -> dict[str, Shape]:
    """Visual features, from one graph to the other."""
    features: dict[str, Shape] = {"visual_embeds": (_FLOAT, (None, model.hidden))}
    if model.vision.deepstack:
        features["deepstack_embeds"] = (_FLOAT, (model.vision.deepstack, None, model.hidden))
    return features


def _require(graph: str, kind: str, values: Any, wanted: Mapping[str, Shape]) -> None:
    given = {value.name: value for value in values}
    for name in wanted.keys() - given.keys():
        raise EngineError(f"the {graph} graph has no {kind} {name}, which the model of manifest.json has")
    for name in given.keys() - wanted.keys():
        raise EngineError(f"the {graph} graph has an {kind} {name}, which the model of manifest.json has not")
    for name, (dtype, sizes) in wanted.items():
        value = given[name]
        shape = list(value.shape)
        fits = len(shape) == len(sizes) and all(size in (None, has) for size, has in zip(sizes, shape, strict=True))
        if value.type != dtype or not fits:
            expected = [("any" if size is None else size) for size in sizes]
            raise EngineError(
                f"the {graph} graph's {kind} {name} is {value.type} {_text(shape)}, "
                f"the model of manifest.json needs {dtype} {_text(expected)}"
            )


def _text(sizes: list[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
