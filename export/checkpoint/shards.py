"""Which safetensors files are the model: one alone, or an index and the shards that it names, and no others."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from moevlm.export.checkpoint.files import find, read_json
from moevlm.export.checkpoint.safetensors_file import Stored, read_header
from moevlm.runtime.core.errors import CheckpointError, one_line, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# Files that transformers reads, too: other names are other programs' copies of the weights.
_OURS = ("model", "adapter_model")
_NAME_MAX = 255  # bytes of a file's name


def read_shards(directory: Path) -> tuple[tuple[str, ...], dict[str, Stored]]:
    """(file names, tensors by name) of a single file or of an index with its shards; headers alone are read.

    Raises CheckpointError where index and shards differ in either direction, and for a file that belongs to neither.
    """
    if find(directory, SINGLE):
        _refuse_others(directory, (SINGLE,), SINGLE)
        return (SINGLE,), read_header(directory / SINGLE)
    if not find(directory, INDEX):
        raise CheckpointError(_nothing_to_read(directory))
    weight_map = _weight_map(directory)
    shards = tuple(sorted(set(weight_map.values())))
    missing = [shard for shard in shards if not find(directory, shard)]
    if missing:
        raise CheckpointError(f"{directory} lacks {some(missing)} of its {len(shards)} shards, named in {INDEX}")
    _refuse_others(directory, shards, INDEX)
    headers = {shard: read_header(directory / shard) for shard in shards}
    absent = [f"{one_line(name, 80)} ({shard})" for name, shard in weight_map.items() if name not in headers[shard]]
    if absent:
        raise CheckpointError(f"{directory / INDEX} names tensors that their shard does not hold: {some(absent)}")
    unlisted = [
        f"{one_line(name, 80)} ({shard})"
        for shard, header in headers.items()
        for name in header
        if weight_map.get(name) != shard
    ]
    if unlisted:
        raise CheckpointError(f"{directory / INDEX} does not name tensors that its shards hold: {some(unlisted)}")
    return shards, {name: headers[shard][name] for name, shard in weight_map.items()}


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few of a list of names."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _weight_map(directory: Path) -> Mapping[str, str]:
    weight_map = read_json(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX} has no weight_map")
    checked = {shard for shard in weight_map.values() if isinstance(shard, str) and _is_file_name(shard)}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in checked:
            place = f"{one_line(name, 80)} is in {shown(shard)}"
            raise CheckpointError(f"{directory / INDEX}: {place}, which is not a shard's file name")
    return weight_map


def _is_file_name(shard: str) -> bool:
    try:
        fits = len(os.fsencode(shard)) <= _NAME_MAX
    except UnicodeEncodeError:
        return False
    return fits and "\0" not in shard and Path(shard).name == shard and shard.endswith(".safetensors")


def _refuse_others(directory: Path, named: tuple[str, ...], by: str) -> None:
    """Raise CheckpointError for a file of weights beside the model's own: which of them is meant cannot be told."""
    others = [name for name in _files(directory, ".safetensors") if name.startswith(_OURS) and name not in named]
    if others:
        told = "" if by in named else f", which {by} does not name"
        raise CheckpointError(
            f"{directory} has {some(others)}{told} (allowed: {SINGLE} alone, or {INDEX} and the shards that it names)"
        )


def _files(directory: Path, *endings: str) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.endswith(endings) and path.is_file())


def _nothing_to_read(directory: Path) -> str:
    pickles, others = _files(directory, *_PICKLES), _files(directory, ".safetensors")
    if others:
        return f"{directory} has neither {SINGLE} nor {INDEX}; it has {some(others)}"
    if pickles:
        return f"{directory} has no safetensors file, only {some(pickles)}: convert it, pickles are never read"
    return f"{directory} has no weights: neither {SINGLE} nor {INDEX}"
