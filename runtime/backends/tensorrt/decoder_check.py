"""Check a decoder engine's tensors and profiles against the manifest."""

from __future__ import annotations

from moevlm.runtime.backends.tensorrt.device_engine import DeviceEngine
from moevlm.runtime.backends.tensorrt.state_memory import Shapes
from moevlm.runtime.core.dtypes import DTYPES
from moevlm.runtime.core.engine_metadata import TensorRTMetadata
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.core.names import CANDIDATE_OUTPUTS

ANY, DECODE = 0, 1  # profiles: of any step, and of one token of each sequence
ACTIVATIONS = ("bfloat16", "float16", "float32")


def check_decoder(
    engine: DeviceEngine, model: ModelMetadata, pages: Shapes, rows: Shapes, metadata: TensorRTMetadata
) -> list[str]:
    """Names of the inputs that are expert weights: all that are no part of a step and no state.

    pages, rows: of all states, as `state_memory` gives them. Raises EngineError where the engine is not what is said
    of it.
    """
    if metadata.activations not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise EngineError(f"unsupported value activations = {metadata.activations!r} (supported: {allowed})")
    ropes = [f"rope_{name}.{group}" for group in range(len(model.ropes)) for name in ("cos", "sin")]
    step = ["input_ids", *ropes, "query_start", "context_len", "page_table", "logits_index"]
    step += ["visual_index", "visual_embeds"] if model.vision else []
    step += ["deepstack_embeds"] if model.deepstack else []
    step += ["visible_end"] if model.bidirectional_images else []
    step += ["query_scale"] if model.query_scale is not None else []
    step += ["state_row"] if rows else []
    kept = {**pages, **rows}
    for names, given, kind in (
        ((*step, *kept), engine.inputs, "input"),
        (("logits", *CANDIDATE_OUTPUTS), engine.outputs, "output"),
    ):
        if missing := sorted(set(names) - set(given)):
            raise EngineError(f"{engine.name} has no {kind} {missing[0]}")
    _check_shapes(engine, model, kept, metadata)
    _check_profiles(engine, model, metadata)
    return [name for name in engine.inputs if name not in {*step, *kept}]


def _check_shapes(engine: DeviceEngine, model: ModelMetadata, kept: Shapes, metadata: TensorRTMetadata) -> None:
    for name, (kept_dtype, shape) in kept.items():
        dtype = DTYPES[kept_dtype].tensorrt
        if (engine.inputs[name], engine.dtypes[name]) != ((-1, *shape), dtype):
            shown = f"{engine.dtypes[name]} {engine.inputs[name]}"
            raise EngineError(f"{engine.name} has {name} {shown}, manifest.json says {dtype} {(-1, *shape)}")
    features = DTYPES[metadata.activations].tensorrt
    levels = engine.inputs["deepstack_embeds"][0] if "deepstack_embeds" in engine.inputs else 0
    numbers: list[tuple[str, object, object]] = [
        ("vocabulary", engine.outputs["logits"][1], model.vocabulary),
        ("deepstack", levels, model.deepstack),
    ]
    if model.vision is not None:
        numbers.append(("hidden", engine.inputs["visual_embeds"][1], model.hidden))
        numbers.append(("visual_embeds in", engine.dtypes["visual_embeds"], features))
    for what, found, said in numbers:
        if found != said:
            raise EngineError(f"{engine.name} has {what} = {found}, manifest.json says {said}")


def _check_profiles(engine: DeviceEngine, model: ModelMetadata, metadata: TensorRTMetadata) -> None:
    sequences = metadata.max_sequences
    visual = (("visual_embeds", ANY, metadata.max_visual),) if model.vision else ()
    for name, profile, said in (
        ("input_ids", ANY, metadata.max_tokens),
        ("input_ids", DECODE, sequences),
        ("context_len", ANY, sequences),
        ("context_len", DECODE, sequences),
        ("logits_index", ANY, metadata.max_logits),
        ("logits_index", DECODE, sequences),
        *visual,
    ):
        most = engine.most(name, profile)[0]
        if most < said:
            raise EngineError(f"{engine.name} takes {name} up to {most}, manifest.json says {said}")
