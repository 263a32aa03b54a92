"""A field of config.json that nobody knows, in every object that every family reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from moevlm.export.families import family_for
from moevlm.export.families.base import families
from moevlm.runtime.core.errors import UnsupportedModelError
from tests.support.checkpoints import refused
from tests.support.families import TINY
from tests.support.tiny import TinyCheckpoint

TABLES = ("id2label", "label2id", "projector_patch_to_query_dict")  # objects whose keys are no fields


def objects(values: dict[str, Any], path: str = "") -> Iterator[str]:
    """The dotted name of each object, with a dot behind it."""
    yield path
    for key, value in values.items():
        if isinstance(value, dict) and key not in TABLES:
            yield from objects(value, f"{path}{key}.")


@pytest.mark.parametrize("model_type", TINY)
def test_field_that_nobody_knows_is_refused_by_name(model_type: str) -> None:
    values, part = json.loads(TinyCheckpoint(model_type).config().to_json_string()), families()[model_type].part
    values = {"model_type": model_type, part: values} if part else values
    paths = [path for path in objects(values) if "audio_config" not in path]  # nobody reads it
    assert len(paths) >= 2
    for path in paths:
        config = copy.deepcopy(values)
        place = config
        for key in path.split(".")[:-1]:
            place = place[key]
        place["talks_backwards"] = 3
        told = f"unsupported field in config.json: {path}talks_backwards = 3"
        refused(UnsupportedModelError, told, act=lambda config=config: family_for(config).config(config))
