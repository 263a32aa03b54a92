"""docs/json.md, the structs behind every report, and the fields that users rely on say the same."""

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moevlm.export.parity.report import ParityReport
from moevlm.runtime.cli.doctor import DoctorReport
from moevlm.runtime.cli.inspect_report import InspectReport
from moevlm.runtime.cli.run_report import RunReport
from moevlm.runtime.core.reports import Report
from moevlm.runtime.perf.latency_report import BenchReport

DOCS = Path(__file__).parents[1] / "docs/json.md"
REPORTS = {
    report.__struct_config__.tag: report
    for report in (RunReport, InspectReport, ParityReport, BenchReport, DoctorReport)
}
_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    tuple: "array",
    dict: "object",
}
# JSON has no infinity: msgspec writes null.
_NULL_IF_INFINITE = {
    ("moevlm.parity/1", field)
    for field in (
        "checks[].value",
        "costs[].value",
        "text.perplexity",
        "text.engines[].perplexity",
        "text.engines[].kl",
    )
}

# What each schema promises. Add to it; a change or a removal needs a new number.
GOLDEN = {
    "moevlm.run/1": {
        "schema": "string",
        "target": "string",
        "text": "string",
        "token_ids": "array of integer",
        "finish_reason": "string",
        "prompt_tokens": "integer",
        "image_tokens": "integer",
        "new_tokens": "integer",
        "vision_seconds": "number",
        "prefill_seconds": "number",
        "decode_seconds": "number",
        "logprobs": "array of object or null",
        "logprobs[].id": "integer",
        "logprobs[].logprob": "number",
        "logprobs[].top": "array of array",
    },
    "moevlm.inspect/3": {
        "schema": "string",
        "bundle": "string",
        "bytes": "integer",
        "verified": "boolean",
        "model": "object",
        "model.model_type": "string",
        "model.hidden": "integer",
        "model.vocabulary": "integer",
        "model.context": "integer",
        "model.layers": "array of object",
        **{
            f"model.layers[].{field}": "integer"
            for field in ("heads", "kv_heads", "key_dim", "value_dim", "window", "chunk", "experts", "top_k")
        },
        "model.layers[].bidirectional_images": "boolean",
        "model.eos_token_ids": "array of integer",
        "model.image_token_id": "integer or null",
        "model.image_marks": "object",
        **{
            f"model.image_marks.{mark}": "array of integer"
            for mark in ("placeholder", "begin", "end", "row_break", "tile_break", "tile_row_end", "overview")
        },
        "model.video": "object or null",
        "model.video.placeholder": "integer",
        "model.video.token_id": "integer",
        "model.video.begin": "array of integer",
        "model.video.end": "array of integer",
        "model.ropes": "array of object",
        "model.ropes[].dim": "integer",
        "model.ropes[].theta": "number",
        "model.ropes[].sections": "array of integer",
        "model.ropes[].interleaved": "boolean",
        "model.ropes[].alternating": "boolean",
        "model.query_scale": "object or null",
        "model.query_scale.beta": "number",
        "model.query_scale.original": "integer",
        "model.query_scale.offset": "integer",
        "model.ropes[].factor": "number",
        "model.ropes[].frequencies": "array of number",
        "model.vision": "object or null",
        "model.vision.kind": "string",
        "model.vision.patch_size": "integer",
        "model.vision.temporal_patch_size": "integer",
        "model.vision.merge_size": "integer",
        "model.vision.channels": "integer",
        "model.vision.head_dim": "integer",
        "model.vision.rope_theta": "number",
        "model.vision.position_grid": "integer",
        "model.vision.position_resampling": "string",
        "model.vision.deepstack": "integer",
        "model.vision.position_table": "integer",
        "model.vision.side": "integer",
        "engines": "array of object",
        "engines[].target": "string",
        "engines[].dtype": "string",
        "engines[].bytes": "integer",
        "engines[].parity": "string",
        "engines[].group_size": "integer",
        "engines[].kv_cache": "string",
        "engines[].state_bytes": "integer",
        "engines[].sparsity": "string",
        "engines[].problems": "array of string",
        "engines[].tensorrt": "object or null",
        "engines[].memory": "object or null",
        **{
            f"engines[].memory.{field}": "integer"
            for field in ("dense", "experts", "vision", "workspace", "driver", "page", "page_tokens", "row")
        },
        "engines[].memory.gpus": "array of object",
        "engines[].memory.gpus[].gpu": "string",
        "engines[].memory.gpus[].fits": "boolean",
        **{f"engines[].memory.gpus[].{field}": "integer" for field in ("memory", "host_layers", "tokens", "sequences")},
        **{f"engines[].memory.gpus[].{field}": "number" for field in ("decode", "decode_together")},
        "engines[].kernels": "object or null",
        **{f"engines[].kernels.{field}": "integer" for field in ("count", "registers", "shared", "spilled")},
        **{f"engines[].tensorrt.{field}": "string" for field in ("product", "version", "activations", "experts")},
        **{
            f"engines[].tensorrt.{field}": "integer"
            for field in (
                "max_sequences",
                "max_tokens",
                "max_logits",
                "max_visual",
                "max_patches",
                "max_pages",
                "max_rows",
                "workspace",
            )
        },
        "engines[].tensorrt.sms": "array of integer",
        "engines[].tensorrt.version_compatible": "boolean",
        "source": "object",
        "tools": "object",
        "ignored_config": "array of string",
        "left_out": "object",
        "stored_as": "object",
        "sampling": "object",
        "sampling.temperature": "number",
        "sampling.top_k": "integer",
        "sampling.top_p": "number",
        "sampling.min_p": "number",
        "sampling.repetition_penalty": "number",
    },
    "moevlm.parity/1": {
        "schema": "string",
        "bundle": "string",
        "checkpoint": "string",
        "transformers": "string",
        "seed": "integer",
        "prompts": "integer",
        "tokens": "integer",
        "passed": "boolean",
        "checks": "array of object",
        "pruned": "array of string",
        "rounded": "array of string",
        "plans": "array of string",
        "left_out": "string",
        "text": "object or null",
        "text.file": "string",
        "text.tokens": "integer",
        "text.windows": "integer",
        "text.perplexity": "number or null",
        "text.engines": "array of object",
        "text.engines[].engine": "string",
        "text.engines[].perplexity": "number or null",
        "text.engines[].kl": "number or null",
        "text.engines[].same_first_choice": "number",
        "quick": "boolean",
        "costs": "array of object",
        "costs[].step": "string",
        "costs[].quantity": "string",
        "costs[].value": "number or null",
        "costs[].note": "string",
        "costs[].flips": "array of object",
        "costs[].flips[].layer": "integer",
        "costs[].flips[].token": "integer",
        "costs[].flips[].margin": "number",
        "checks[].step": "string",
        "checks[].quantity": "string",
        "checks[].value": "number or null",
        "checks[].limit": "number",
        "checks[].passed": "boolean",
        "checks[].note": "string",
        "checks[].flips": "array of object",
        "checks[].flips[].layer": "integer",
        "checks[].flips[].token": "integer",
        "checks[].flips[].margin": "number",
    },
    "moevlm.doctor/1": {
        "schema": "string",
        **dict.fromkeys(("moevlm", "folder", "python", "system", "processor", "instruction_set"), "string"),
        "instruction_problem": "string",
        **dict.fromkeys(("compiler", "gpu_problem", "gpu.name", "targets[].target"), "string"),
        **dict.fromkeys(("cores", "gpu.sm", "gpu.driver"), "integer"),
        "quota": "number or null",
        "memory": "integer or null",
        "available_memory": "integer or null",
        "gpu": "object or null",
        "packages": "object",
        "libraries": "object",
        "targets": "array of object",
        "targets[].missing_to_run": "array of string",
        "targets[].missing_to_build": "array of string",
    },
    "moevlm.bench.latency/1": {
        "schema": "string",
        "bundle": "string",
        "prompt_tokens": "integer",
        "image_tokens": "integer",
        "image_size": "integer",
        "new_tokens": "integer",
        "repeats": "integer",
        "results": "array of object",
        "machine": "object or null",
        "machine.threads": "integer",
        "gpu": "object or null",
        "gpu.name": "string",
        "gpu.copied": "number",
        **{f"machine.{rate}": "number" for rate in ("read", "float32", "int8")},
        **{f"results[].{stage}_limit": "object or null" for stage in ("vision", "prefill", "decode")},
        **{
            f"results[].{stage}_limit.{field}": kind
            for stage in ("vision", "prefill", "decode")
            for field, kind in (
                ("bytes", "integer"),
                ("flops", "integer"),
                ("seconds", "number"),
                ("bound", "string"),
                ("fraction", "number"),
            )
        },
        "results[].target": "string",
        "results[].threads": "integer or null",
        "results[].load_seconds": "number",
        "results[].graphs": "string or null",
        "results[].decode_tokens_per_second": "number",
        "results[].prefill_tokens_per_second": "number",
        "results[].vision": "object or null",
        **{f"results[].{stage}": "object" for stage in ("prefill", "decode_token", "first_token")},
        **{
            f"results[].{stage}.{statistic}": "number"
            for stage in ("vision", "prefill", "decode_token", "first_token")
            for statistic in ("median", "minimum", "maximum")
        },
    },
}


def in_structs(report: type[Report]) -> dict[str, str]:
    """Every field of a report and of what is in it: path to type."""
    schema = report.__struct_config__.tag
    fields = {"schema": "string"} | dict(_fields(report, ""))
    return {path: kind + " or null" if (schema, path) in _NULL_IF_INFINITE else kind for path, kind in fields.items()}


def _fields(struct: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, str]]:
    for name, hint in typing.get_type_hints(struct).items():
        if name in struct.__struct_fields__:
            kind, inner, suffix = _kind(hint)
            yield prefix + name, kind
            for one in inner:
                if one.__struct_config__.tag is not None:  # one of several
                    yield f"{prefix}{name}{suffix}.{one.__struct_config__.tag_field}", "string"
                yield from _fields(one, f"{prefix}{name}{suffix}.")


def _kind(hint: Any) -> tuple[str, tuple[type[msgspec.Struct], ...], str]:
    """(type in JSON's words, the structs in it, "[]" if they are in an array)."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        others = [_kind(argument) for argument in arguments if argument is not type(None)]
        ((kind, suffix),) = {(kind, suffix) for kind, _, suffix in others}
        null = " or null" if type(None) in arguments else ""
        return kind + null, tuple(struct for _, inner, _ in others for struct in inner), suffix
    if isinstance(origin, type) and issubclass(origin, msgspec.Struct):
        return "object", (origin,), ""
    if origin in (list, tuple):
        kind, inner, _ = _kind(arguments[0])
        return f"array of {kind.split()[0]}", inner, "[]"
    return _NAMES[origin], (), ""


def in_docs(text: str) -> dict[str, dict[str, str]]:
    """Schema to (path to type), from the tables under each heading."""
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        schema, *parts = re.split(r"^### ", section, flags=re.M)
        name = re.findall(r"`(.+?)`", schema.splitlines()[0])[0]
        found[name] = {}
        for part, prefixes in [(schema, [""])] + [
            (part, [path + "." for path in re.findall(r"`(.+?)`", part.splitlines()[0])]) for part in parts
        ]:
            rows = re.findall(r"^\| `(\w+)` \| ([\w ]+?) \| (.+?) \|$", part, flags=re.M)
            found[name] |= {prefix + field: kind for prefix in prefixes for field, kind, _ in rows}
    return found


@pytest.mark.parametrize("schema", REPORTS)
def test_docs_describe_every_field_of_the_structs_and_no_other(schema: str) -> None:
    assert in_docs(DOCS.read_text())[schema] == in_structs(REPORTS[schema])


@pytest.mark.parametrize("schema", REPORTS)
def test_no_field_of_version_1_changed_or_went(schema: str) -> None:
    fields = in_structs(REPORTS[schema])
    assert {path: fields.get(path) for path in GOLDEN[schema]} == GOLDEN[schema]


def test_docs_have_a_section_for_every_report_and_for_nothing_else() -> None:
    assert set(in_docs(DOCS.read_text())) == set(REPORTS) == set(GOLDEN)
    assert set(Report.__subclasses__()) == set(REPORTS.values())
