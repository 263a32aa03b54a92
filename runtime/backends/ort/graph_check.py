"""Checks at load that two graphs are the vision tower and the decoder of the manifest's model."""

from collections.abc import Mapping
from typing import Any

from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS, CANDIDATES
from moevlm.runtime.core.states import PagedKV, Recurrent, StateSpec, output_name

_FLOAT, _INT32, _INT64 = "tensor(float)", "tensor(int32)", "tensor(int64)"
_DTYPES = {"float32": _FLOAT, "int64": _INT64}
_STATES = {"float32": _FLOAT, "int8": "tensor(int8)"}

# Dtype as ONNX Runtime names it, and sizes; None for one that differs from step to step.
Shape = tuple[str, tuple[int | None, ...]]


def check_vision_graph(session: Any, model: ModelMetadata) -> None:
    """Raise EngineError unless an InferenceSession takes and gives what the model's vision tower does."""
    inputs: dict[str, Shape] = {
        name: (_DTYPES[dtype], (None, width)) for name, (width, dtype) in model.tower.inputs.items()
    }
    _require("vision", "input", session.get_inputs(), inputs | {"image_start": (_INT32, (None,))})
    _require("vision", "output", session.get_outputs(), _features(model))


def check_decoder_graph(session: Any, model: ModelMetadata, metadata: EngineMetadata) -> None:
    """Raises EngineError as `check_vision_graph`; more outputs are allowed.

    Where a sequence lies in one page, there may be no page_table.
    """
    kept = _states(metadata.states)
    sequences: dict[str, Shape] = {}
    paged, recurrent = (any(isinstance(state, kind) for state in metadata.states) for kind in (PagedKV, Recurrent))
    if metadata.states:
        sequences |= {"query_start": (_INT32, (None,)), "context_len": (_INT32, (None,))}
    if paged and (metadata.page_size or "page_table" in {value.name for value in session.get_inputs()}):
        sequences["page_table"] = _INT32, (None, None)
    if recurrent:
        sequences["state_row"] = _INT32, (None,)
    if model.vision is not None:
        sequences["visual_index"] = _INT64, (None,)
    if model.bidirectional_images:
        sequences["visible_end"] = _INT32, (None,)
    if model.query_scale is not None:
        sequences["query_scale"] = _FLOAT, (None,)
    ropes = {
        f"rope_{name}.{group}": (_FLOAT, (None, (rope.dim + 1) // 2))
        for group, rope in enumerate(model.ropes)
        for name in ("cos", "sin")
    }
    _require("decoder", "input", session.get_inputs(), {
        "input_ids": (_INT64, (None,)),
        "logits_index": (_INT32, (None,)),
        **ropes,
        **sequences,
        **_features(model),
        **kept,
    })  # fmt: skip
    outputs = {"logits": (_FLOAT, (None, model.vocabulary)), **{output_name(name): kept[name] for name in kept}}
    if CANDIDATE_OUTPUTS[0] in {value.name for value in session.get_outputs()}:
        count = min(CANDIDATES, model.vocabulary)
        shapes: tuple[Shape, ...] = ((_FLOAT, (None, count)), (_INT32, (None, count)), (_FLOAT, (None,)))
        outputs |= dict(zip(CANDIDATE_OUTPUTS, shapes, strict=True))
    given = [value for value in session.get_outputs() if value.name in outputs]
    _require("decoder", "output", given, outputs)


def _states(states: tuple[StateSpec, ...]) -> dict[str, Shape]:
    """Inputs of the decoder that its outputs replace."""
    kept: dict[str, Shape] = {}
    for state in states:
        if state.dtype not in _STATES:
            raise EngineError(f"the engine keeps {state.dtype} (supported: {', '.join(_STATES)})")
        if isinstance(state, PagedKV):
            kept |= {name: (_STATES[state.dtype], (None, state.kv_heads, None, n)) for name, n in state.widths.items()}
        else:
            kept[state.tensor] = _STATES[state.dtype], (None, *state.shape)
    return kept


def _features(model: ModelMetadata) -> dict[str, Shape]:
    """Visual features, from one graph to the other; none without a tower."""
    if model.vision is None:
        return {}
    features: dict[str, Shape] = {"visual_embeds": (_FLOAT, (None, model.hidden))}
    if model.deepstack:
        features["deepstack_embeds"] = (_FLOAT, (model.deepstack, None, model.hidden))
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
