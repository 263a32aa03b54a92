"""Models that join a tower to a whole language model: tensors under either kind of prefix, and a head or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import assert_same, canonical, names, renamed
from tests.support.tiny import TinyCheckpoint, edit_json, edit_tensors

# Tensors that a checkpoint has if it is as published.
PUBLISHED = {
    "aria": ["vision_tower.post_layernorm.weight", "language_model.model.layers.1.mlp.experts.fc2.weight"],
    "internvl": [
        "multi_modal_projector.linear_1.weight",
        "language_model.model.layers.1.mlp.experts.7.up_proj.weight",
    ],
    "mistral3": ["vision_tower.transformer.layers.0.attention.q_proj.weight"],
}


def as_transformers(name: str) -> str:
    """The name in the model, whichever of the two ways it was saved."""
    name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
    return name if name.startswith(("model.", "lm_head")) else f"model.{name}"


def as_published(name: str) -> str:
    name = as_transformers(name).removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1).replace("lm_head", "language_model.lm_head", 1)


@pytest.fixture(scope="module", params=PUBLISHED)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def saved(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be left as it is."""
    return TinyCheckpoint(model_type, text={"vocab_size": 96}, seed=76).save(tmp_path_factory.mktemp(model_type) / "it")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("spell", [as_transformers, as_published], ids=["as transformers names them", "as published"])
def test_prefixes_of_either_kind_are_one_model(
    spell: Callable[[str], str], model_type: str, saved: Path, copy: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    directory = renamed(copy, spell)
    found = names(directory)
    for name in ("language_model.lm_head.weight", *PUBLISHED[model_type]):
        assert (name in found) == (spell is as_published)
    _, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert_same(canonical(directory), canonical(saved))


@pytest.mark.parametrize("there", [True, False])
def test_a_config_that_does_not_say_so_has_the_head_that_the_checkpoint_has(there: bool, copy: Path) -> None:
    edit_json(copy / "config.json", lambda config: config.pop("tie_word_embeddings"))
    (head,) = (name for name in names(copy) if "lm_head" in name)
    if not there:
        edit_tensors(copy, lambda tensors: tensors.pop(head))
    found = canonical(copy)
    assert np.array_equal(found["decoder.head"], found["decoder.embedding"]) == (not there)
