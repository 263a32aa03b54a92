"""Parity of requests: a bundle whose text files turn a request into something else than transformers fails, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moevlm.export.build import build
from moevlm.export.parity.report import Check
from moevlm.export.parity.requests import request_checks
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.towers import TileTower
from tests.support.bundles import copy_bundle, edit_manifest, rehash
from tests.support.tiny import CHAT_TEMPLATE, TinyCheckpoint, edit_json


def checked(bundle: Path, checkpoint: Path) -> list[Check]:
    return request_checks(Bundle.open(bundle), checkpoint, seed=0)


def test_a_good_bundle_s_requests_are_those_of_transformers(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    found = checked(tiny_bundle, tiny_checkpoint)
    assert [check.quantity for check in found] == [
        "60 conversations whose ids differ",
        "6 typed control tokens that are not text",
        "8 images cut otherwise",
        "values of their patches",
    ]
    assert all(check.passed and not check.note and check.step == "requests" for check in found)


def test_beside_a_tekken_json_the_class_of_mistral_common_is_not_needed(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "tekken.json").write_text("{}")
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "MistralCommonBackend"}')
    assert all(check.passed and not check.note for check in checked(tiny_bundle, checkpoint))


def test_tokens_around_an_image_are_those_of_transformers_processor(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint("gemma4", side_files=True).save(tmp_path / "checkpoint")
    bundle = build(checkpoint, tmp_path / "gemma.moevlm", ["reference"]).directory
    assert all(check.passed and not check.note for check in checked(bundle, checkpoint))
    edit_manifest(bundle, lambda manifest: manifest["model"]["image_marks"].update(end=[3]))
    (failed,) = [check for check in checked(bundle, checkpoint) if not check.passed]
    assert failed.quantity == "60 conversations whose ids differ"
    assert failed.note == "text 0 about two images: token 13 is 3, of transformers 4"


def test_texts_of_llama4_are_those_that_its_processor_writes(tmp_path: Path) -> None:
    checkpoint = TinyCheckpoint("llama4", side_files=True).save(tmp_path / "checkpoint")
    bundle = build(checkpoint, tmp_path / "llama.moevlm", ["reference"]).directory
    texts, typed, images = checked(bundle, checkpoint)
    assert (texts.quantity, texts.passed, typed.passed) == ("60 conversations whose ids differ", True, True)
    assert "needs torchvision" in images.note


def plain_stop(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|im_end|>"]


@pytest.mark.parametrize(
    ("file", "change", "quantity", "word"),
    [
        ("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}), "conversations", "text 0: token"),
        ("tokenizer.json", plain_stop, "conversations", "of transformers"),
        ("preprocessor.json", lambda p: p["size"].update(longest_edge=640), "images cut otherwise", "of transformers"),
        ("preprocessor.json", lambda p: p.update(image_mean=[0.5, 0.5, 0.49]), "values of their patches", ""),
        ("preprocessor.json", lambda p: p.update(resample=2), "values of their patches", ""),
    ],
)
def test_another_tokenizer_or_preprocessor_is_found(
    file: str,
    change: Callable[[dict[str, Any]], object],
    quantity: str,
    word: str,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    edit_json(bundle / file, change)
    rehash(bundle, file)
    failed = [check for check in checked(bundle, tiny_checkpoint) if not check.passed]
    assert [quantity in check.quantity for check in failed] == [True]
    assert word in failed[0].note


def test_another_template_is_found(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    (bundle / "chat_template.jinja").write_text("{{ eos_token }}" + CHAT_TEMPLATE)
    rehash(bundle, "chat_template.jinja")
    edit_manifest(bundle, lambda manifest: manifest.update(template_variables={"eos_token": "<|im_end|>"}))
    (check, *_) = checked(bundle, tiny_checkpoint)
    assert (check.value, check.passed) == (60, False)
    assert check.note == "text 0: token 0 is 2, of transformers 1"


def test_template_that_refuses_what_transformers_renders_is_found(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (bundle / "chat_template.jinja").write_text(refusal + CHAT_TEMPLATE)
    rehash(bundle, "chat_template.jinja")
    (check, *_) = checked(bundle, tiny_checkpoint)
    assert (check.value, check.passed) == (24, False)
    assert check.note == "text 0 after a system message: refused, not so by transformers"


def test_what_a_bundle_lacks_is_said_not_to_be_compared(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    for name in ("chat_template.jinja", "preprocessor.json"):
        (bundle / name).unlink()
        edit_manifest(bundle, lambda manifest, name=name: manifest["files"].pop(name))  # type: ignore[misc]
    found = checked(bundle, tiny_checkpoint)
    assert [(check.quantity, check.note) for check in found if not check.compared] == [
        ("conversations", "the checkpoint has no chat template"),
        ("images", "the checkpoint has no image processor"),
    ]


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_images_that_transformers_cuts_with_torchvision_are_not_compared_without_it(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    tower = TileTower(patch_size=4, merge_size=2, channels=3, head_dim=8, rope_theta=1e4, side=8)
    edit_manifest(bundle, lambda manifest: manifest["model"].update(vision=msgspec.to_builtins(tower)))
    fields = {"image_processor_type": "Llama4ImageProcessor", "size": {"height": 32, "width": 32}}
    (bundle / "preprocessor.json").write_text(json.dumps(fields))
    rehash(bundle, "preprocessor.json")
    images = checked(bundle, tiny_checkpoint)[-1]
    assert (images.quantity, images.compared) == ("images", False)
    assert images.note.startswith("transformers' image processor of this model needs torchvision (pip install torch")


def test_variables_and_templates_are_those_that_transformers_takes(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A checkpoint of several homes, and a bundle with what its build takes of them."""
    template = CHAT_TEMPLATE.replace("'<|im_end|>\\n'", "eos_token + '\\n'")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_text((tiny_checkpoint / name).read_text())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": template}))
    bundle = copy_bundle(tiny_bundle, tmp_path)
    (bundle / "chat_template.jinja").write_text(template)
    rehash(bundle, "chat_template.jinja")
    edit_manifest(bundle, lambda manifest: manifest.update(template_variables={"eos_token": "<|im_end|>"}))
    assert all(check.passed for check in checked(bundle, folder))


def test_splitting_that_a_named_class_brings_is_told(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text((tiny_checkpoint / name).read_text())
    tokens = json.loads((tiny_checkpoint / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token.pop("id")): token for token in tokens}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (check, *_) = checked(tiny_bundle, tmp_path)
    assert not check.passed
    assert check.note.endswith("(class Qwen2Tokenizer has its own normalizer and pre_tokenizer)")
