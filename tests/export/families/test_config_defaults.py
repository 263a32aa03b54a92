"""Fields that config.json leaves out, and nulls: every family reads them as transformers does, or refuses.

Of each family's tiny model: all fields that are read with a default, or asked for, are taken away one at a time, and
set to null one at a time; transformers' own configuration class says what that means.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from moevlm.export.config import ModelConfig
from moevlm.export.families import family_for, fields
from moevlm.export.families.base import families
from moevlm.export.families.fields import Fields
from moevlm.runtime.core.errors import MoevlmError
from tests.support.families import TINY
from tests.support.tiny import TinyCheckpoint

Config = dict[str, Any]

# As many heads as each default of num_key_value_heads divides, and for latent attention just as many.
HEADS = {
    **dict.fromkeys(("deepseek_v3", "kimi_k2", "kimi_k25"), 128),
    "glm4_moe_lite": 20,
    "ernie4_5_vl_moe": 4,
    "ernie4_5_moe": 16,
}
WIDE = {"ernie4_5_vl_moe": {"hidden_size": 64}}  # whose heads have an equal part of it
CHECKED_IF_SAID = {  # numbers that must be those of other fields, which decide
    *("gemma4: vision_config.num_key_value_heads", "internvl: image_seq_length", "kimi_k25: projection_hidden_size"),
}
VIDEO = ("video", "vision_start", "vision_end", "image_start", "image_end")  # tokens without which videos are refused
NULLS = {"q_lora_rank", "attention_chunk_size", "eos_token_id"}  # a meaning of its own, tested beside each family
NULLS |= {"projection_hidden_size", "moe_norm_min"}  # read as if it were absent; no model of transformers' runs with it


def variants() -> Iterator[tuple[str, str]]:
    """Every family's first tiny model, and one for each further text model that it takes."""
    for family, tiny in TINY.items():
        texts = set()
        for name, options in tiny.configurations.items():
            text = options.get("text", {}).get("model_type", "")
            if not texts or text not in texts:
                yield family, name
            texts.add(text)


MODELS = pytest.mark.parametrize(("family", "name"), [*variants()], ids=lambda value: value)


def tiny_config(family: str, name: str) -> Config:
    options = dict(TINY[family].configurations[name])
    heads = {"num_attention_heads": HEADS.get(family, 32)}
    options["text"] = options.get("text", {}) | heads | WIDE.get(family, {})
    if family in ("deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe_lite", "mistral3"):
        options["text"] |= {"num_key_value_heads": heads["num_attention_heads"]}
    config = json.loads(json.dumps(TinyCheckpoint(family, **options).config().to_dict()))
    part = families()[family].part
    return {"model_type": family} | ({part: config} if part else config | {"model_type": family})


@contextmanager
def recorded() -> Iterator[dict[str, Any]]:
    """Dotted names of fields to the defaults that they are read with; None for those that are only asked for."""
    found: dict[str, Any] = {}
    get, contains = Fields.get, Fields.__contains__

    def record(self: Fields, key: str, default: Any = fields._REQUIRED) -> Any:
        if default is not fields._REQUIRED:
            found[self._name(key)] = default
        return get(self, key, default)

    def ask(self: Fields, key: str) -> bool:
        found.setdefault(self._name(key), None)
        return contains(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fields, "get", record)
        patch.setattr(Fields, "__contains__", ask)
        yield found


def defaults_of(config: Config) -> dict[str, Any]:
    """Of the fields that are in the config, too."""
    with recorded() as found:
        family_for(config).config(config)
    return {path: default for path, default in found.items() if place(config, path) is not None}


def place(config: Config, path: str) -> Config | None:
    """The object that has the field."""
    *parts, key = path.split(".")
    for part in parts:
        config = config.get(part) or {}
    return config if key in config else None


def changed(config: Config, path: str, change: Callable[[Config, str], object]) -> Config:
    found = copy.deepcopy(config)
    inside = place(found, path)
    assert inside is not None
    change(inside, path.rpartition(".")[2])
    return found


def of_transformers(config: Config) -> Config | None:
    """What its class makes of it; None for what it refuses."""
    values = copy.deepcopy(config)
    model_type = values.pop("model_type")
    kind = CONFIG_MAPPING[model_type if model_type in CONFIG_MAPPING else "deepseek_v3"]
    try:
        return json.loads(json.dumps(kind(**values).to_dict())) | {"model_type": model_type}
    except Exception:
        return None


def outcome(config: Config) -> ModelConfig | str:
    try:
        return family_for(config).config(config)
    except MoevlmError as error:
        return str(error)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_optional(path: str, family: str, name: str) -> bool:
    """Whether transformers' class has the field with another default than null, and takes null nevertheless."""
    part: Any = TinyCheckpoint(family, **TINY[family].configurations[name]).config()
    *parts, key = path.removeprefix(f"{families()[family].part}.").split(".")
    for inner in parts:
        part = getattr(part, inner, None)
    if not dataclasses.is_dataclass(part):
        return False
    found = {field.name: field.default for field in dataclasses.fields(part)}
    return found.get(type(part).attribute_map.get(key, key)) is not None


@MODELS
def test_absent_fields_are_what_transformers_makes_of_them(family: str, name: str) -> None:
    config = tiny_config(family, name)
    defaults = defaults_of(config)
    assert len(defaults) > 8
    for path, default in defaults.items():
        absent = changed(config, path, lambda inside, key: inside.pop(key))
        theirs, ours, key = of_transformers(absent), outcome(absent), path.rpartition(".")[2]
        if (isinstance(ours, str) and "config.json lacks " in ours) or f"{family}: {path}" in CHECKED_IF_SAID:
            continue
        by_checkpoint = getattr(families()[family], "head_by_checkpoint", False)
        if key.startswith(VIDEO) or (key == "tie_word_embeddings" and by_checkpoint):
            continue
        if theirs is None:
            assert "rope" in path, path  # which they look for where they compute it
            continue
        assert ours == outcome(theirs), path
        filled = (place(theirs, path) or {}).get(key)
        if is_number(default) and is_number(filled):  # even where it has no effect on this model
            assert filled == default, path


@MODELS
def test_nulls_are_what_transformers_makes_of_them(family: str, name: str) -> None:
    config = tiny_config(family, name)
    for path, default in defaults_of(config).items():
        null = changed(config, path, lambda inside, key: inside.update({key: None}))
        theirs, ours, key = of_transformers(null), outcome(null), path.rpartition(".")[2]
        if theirs is None or key in NULLS or f"{family}: {path}" in CHECKED_IF_SAID or default is None:
            continue
        if ".rope_" in f".{path}":  # where transformers has no class, and asks for an entry as if null were none
            continue
        if (place(theirs, path) or {}).get(key) is not None:
            assert ours == outcome(theirs), path
        elif isinstance(default, bool):
            assert ours == outcome(changed(config, path, lambda inside, key: inside.update({key: False}))), path
        elif is_optional(path, family, name):
            assert isinstance(ours, str), path
        else:
            assert ours == outcome(changed(config, path, lambda inside, key: inside.pop(key))), path
