"""quantization_config, compression_config and hf_quant_config.json of each method as `Settings`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moevlm.export.checkpoint.directory import CONFIG, MODELOPT
from moevlm.export.checkpoint.files import optional_json
from moevlm.export.checkpoint.quantized.entry import LARGEST, Entry
from moevlm.export.checkpoint.quantized.patterns import Matches, matches
from moevlm.export.checkpoint.quantized.settings import Scheme, Settings
from moevlm.runtime.core.errors import CheckpointError, UnsupportedModelError, quoted, shown

ENTRIES = ("quantization_config", "compression_config")
_DEPTH = 4  # of objects in config.json that are searched: thinker_config.text_config is the deepest


def settings_of(directory: Path, config: Mapping[str, Any], ignored: Sequence[str] = ()) -> Settings:
    """What config.json, else hf_quant_config.json, says; `Settings()` where neither does.

    ignored: dotted names of fields that a user wants to be left unread. Raises UnsupportedModelError, by the field's
    name, for a method, an option or a field that is not supported, CheckpointError for two entries that differ.
    """
    found = dict(_entries(config, "", _DEPTH))
    if not found and (stated := optional_json(directory, MODELOPT)):
        entry = stated.get("quantization")
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{MODELOPT} lacks quantization, an object")
        return _modelopt(Entry(entry, f"{MODELOPT}: quantization", ignored))
    if not found:
        return Settings()
    (path, entry), *others = found.items()
    for other, value in others:
        if value != entry:
            raise CheckpointError(f"config.json has two that differ: {path} and {other} (allowed: one)")
    return _METHODS[_method(entry, path)](Entry(entry, f"{CONFIG}: {path}", ignored))


def _entries(values: Mapping[str, Any], path: str, depth: int) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, value in values.items():
        place = f"{path}.{name}" if path else name
        if name in ENTRIES and value:
            if not isinstance(value, Mapping):
                raise CheckpointError(f"invalid value in config.json: {place} = {shown(value)} (allowed: an object)")
            found.append((place, value))
        elif isinstance(value, Mapping) and depth:
            found += _entries(value, place, depth - 1)
    return found


def _method(entry: Mapping[str, Any], path: str) -> str:
    stated = entry.get("quant_method")
    if stated is None:  # as the tools of these two wrote it once
        stated = "modelopt" if "quant_algo" in entry else "compressed-tensors" if "config_groups" in entry else None
    if not isinstance(stated, str) or stated not in _METHODS:
        raise UnsupportedModelError(
            f"unsupported value in config.json: {path}.quant_method = {quoted(stated)} (supported: "
            f"{', '.join(_METHODS)})"
        )
    return stated


def _fp8(entry: Entry) -> Settings:
    entry.choice("fmt", "e4m3", "float8_e4m3fn")
    entry.choice("scale_fmt", None, "float", "ue8m0")
    entry.choice("expert_dtype", "fp8")
    entry.choice("modules_to_convert", None)
    block = entry.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise entry.refused("weight_block_size", block, "null, or two numbers, as in [128, 128]")
    ignored = entry.modules("modules_to_not_convert", "ignored_layers")
    entry.refuse_unread()
    return Settings("fp8", entry.path, None if block is None else (block[0], block[1]), ignored=ignored)


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 1 <= n <= LARGEST for n in value)


_PACKED = "pack-quantized"
_FORMATS = (
    *(_PACKED, "float-quantized", "naive-quantized", "int-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
)


def _compressed_tensors(entry: Entry) -> Settings:
    entry.choice("format", *_FORMATS)
    ignored = entry.modules("ignore")
    for key in ("sparsity_config", "transform_config"):  # zeros that are not stored, and rotations of weights
        inner = entry.get(key)
        if inner and not (isinstance(inner, Mapping) and inner.get("format") == "dense"):
            raise entry.refused(key, inner, "none")
    schemes, block = [], None
    for _, group in entry.entries("config_groups"):
        if group is None:
            continue
        group.choice("format", *_FORMATS)
        weights, targets = group.entry("weights"), group.get("targets")
        group.refuse_unread()
        if weights is None:
            continue
        scheme, of_group = _scheme(weights)
        block = block or of_group
        schemes.append((_targets(f"{group.path}.targets", targets), scheme))
    entry.refuse_unread()
    schemes.sort(key=lambda pair: pair[0] is _every)  # a group that names modules goes before one for all
    return Settings("compressed-tensors", entry.path, block, tuple(schemes), ignored=ignored)


def _every(_name: str) -> bool:
    return True


def _targets(place: str, targets: Any) -> Matches:
    """Modules by name or expression; the name of a class, such as Linear, stands for all of them."""
    classes = isinstance(targets, list) and any(
        isinstance(t, str) and t[:1].isupper() and "." not in t for t in targets
    )
    return _every if classes else matches(place, targets)


def _scheme(weights: Entry) -> tuple[Scheme, tuple[int, int] | None]:
    integers = weights.choice("type", "int", "float") == "int"
    bits = weights.choice("num_bits", 4, 8)
    symmetric = weights.choice("symmetric", True, False)
    strategy = weights.choice("strategy", "tensor", "channel", "group", "block", "tensor_group")
    size, block = weights.size("group_size"), weights.get("block_structure")
    weights.choice("dynamic", False)
    order = weights.choice("actorder", None, False, True, "group", "dynamic", "weight", "static")
    weights.refuse_unread()
    if strategy == "block" and not _is_block(block):
        raise weights.refused("block_structure", block, "two numbers, as in [128, 128]")
    grouped = size if strategy in ("group", "tensor_group") else 0 if strategy in ("channel", "tensor") else None
    scheme = Scheme(bits, grouped, symmetric if integers else None, order in (True, "group", "dynamic"))
    return scheme, (block[0], block[1]) if block else None


def _gptq(entry: Entry) -> Settings:
    offset = {"gptq": 1, "gptq_v2": 0}
    stated = [entry.choice(key, None, *offset) for key in ("checkpoint_format", "format")]
    entry.choice("method", "gptq")
    entry.choice("pack_dtype", "int32")
    entry.choice("is_marlin_format", False)
    return _integers(entry, "gptq", entry.choice("sym", True, False), offset[stated[0] or stated[1] or "gptq"])


def _auto_round(entry: Entry) -> Settings:
    """Of its own layouts the one that is GPTQ's, under the name that it has there."""
    if (stated := entry.get("packing_format")) != "auto_round:auto_gptq":
        raise entry.refused("packing_format", stated, "auto_round:auto_gptq")
    entry.choice("data_type", "int")
    return _integers(entry, "gptq", entry.choice("sym", True, False), 1)


def _awq(entry: Entry) -> Settings:
    for key in ("version", "checkpoint_format", "format"):
        entry.choice(key, "gemm", "GEMM")
    entry.choice("method", "awq")
    return _integers(entry, "awq", not entry.choice("zero_point", True, False))


def _integers(entry: Entry, method: str, symmetric: bool, zero_offset: int = 0) -> Settings:
    """Fields that the integers of 4 and 8 bits in layers of their own have in common."""
    allowed = (4, 8) if method == "gptq" else (4,)
    entry.get("sym")
    scattered = bool(entry.choice("desc_act", False, True))
    for_all = Scheme(entry.choice("bits", *allowed), entry.size("group_size"), symmetric, scattered)
    lists = [entry.modules("modules_to_not_convert", "ignore")]
    schemes = []
    for fits, other in _exceptions(entry):
        bits = other.choice("bits", None, *allowed, 16) if other is not None else 16
        if other is None or bits == 16:
            lists.append(fits)
            continue
        stated = {
            "bits": bits,
            "group_size": other.size("group_size"),
            "symmetric": other.choice("sym", None, True, False),
            "scattered": other.choice("desc_act", None, True, False),
        }
        schemes.append((fits, replace(for_all, **{key: value for key, value in stated.items() if value is not None})))
        other.refuse_unread()
    entry.refuse_unread()
    ignored: Matches = lambda name: any(fits(name) for fits in lists)  # noqa: E731
    return Settings(method, entry.path, None, (*schemes, (_every, for_all)), zero_offset, ignored)


def _exceptions(entry: Entry) -> Iterator[tuple[Matches, Entry | None]]:
    """Modules that differ, and how; None for those that are not quantized.

    GPTQModel's `dynamic`: "-:EXPRESSION", "+:EXPRESSION" or "EXPRESSION". auto-round's `extra_config`: a name, or an
    expression.
    """
    for key in ("dynamic", "extra_config"):
        for pattern, other in entry.entries(key):
            expression, place = pattern.removeprefix("-:").removeprefix("+:"), f"{entry.path}.{key}"
            fits = matches(place, [expression], expressions=key == "dynamic" or any(c in pattern for c in "*\\^$("))
            yield fits, None if pattern.startswith("-:") else other


def _modelopt(entry: Entry) -> Settings:
    entry.choice("quant_algo", "NVFP4", "W4A16_NVFP4", "FP8", "MXFP8", "MIXED_PRECISION")
    for key in ("group_size", "config_groups", "quantized_layers"):  # the shapes of scales say the same
        entry.get(key)
    ignored = entry.modules("ignore", "exclude_modules")
    entry.refuse_unread()
    return Settings("modelopt", entry.path, ignored=ignored)


def _mxfp4(entry: Entry) -> Settings:
    ignored = entry.modules("modules_to_not_convert")
    entry.refuse_unread()
    return Settings("mxfp4", entry.path, ignored=ignored)


_METHODS: Mapping[str, Callable[[Entry], Settings]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "awq": _awq,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": _mxfp4,
}
