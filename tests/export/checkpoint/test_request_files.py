"""What requests need of a checkpoint is opened and tried at build: refused by name, or carried as it will be used."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.checkpoint.request_files import RequestFiles, request_files
from moevlm.export.model import CanonicalModel
from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.core.manifest import NO_MARKS, ImageMarks, ModelMetadata
from tests.support.command_line import call
from tests.support.families.base import IMAGE
from tests.support.tiny import CHAT_TEMPLATE, edit_json


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ModelMetadata:
    return CanonicalModel.of(Checkpoint.open(tiny_checkpoint)).config.metadata()


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint's files but for its weights."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint", ignore=ignored))


def refused(folder: Path, model: ModelMetadata, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        request_files(folder, model)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(folder))
    for word in words:
        assert word in message


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def test_a_good_checkpoint_has_four_files_and_no_notes(folder: Path, model: ModelMetadata) -> None:
    found = request_files(folder, model)
    assert set(found.files) == {"tokenizer.json", "chat_template.jinja", "preprocessor.json", "video_preprocessor.json"}
    assert found.notes == ()


def test_what_a_checkpoint_lacks_its_bundle_lacks(folder: Path, model: ModelMetadata) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (folder / name).unlink()
    assert request_files(folder, model) == RequestFiles({}, {}, model.eos_token_ids, NO_MARKS)


def test_what_a_bundle_cannot_do_is_said(folder: Path, model: ModelMetadata) -> None:
    assert list(request_files(folder, model).lacking(model)) == []
    (folder / "video_preprocessor_config.json").unlink()
    (videos,) = request_files(folder, model).lacking(model)
    assert videos.endswith(": this bundle takes no videos")
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (folder / name).unlink()
    assert list(request_files(folder, model).lacking(model)) == [
        "the checkpoint has no tokenizer.json and no chat_template.jinja: moevlm run needs them",
        "the checkpoint has no preprocessor_config.json: this bundle takes no images",
    ]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image_processor_type": "Qwen2_5_VLImageProcessor"}, 'image_processor_type = "Qwen2_5_VLImageProcessor"'),
        ({"fps": 2}, "fps = 2"),
        ({"patch_size": 14}, "patch_size = 14 (supported: 4"),
        ({"merge_size": 4}, "merge_size = 4 (supported: 2"),
        ({"temporal_patch_size": 1}, "temporal_patch_size = 1 (supported: 2"),
        ({"size": []}, "size = []"),
        ({"size": {"shortest_edge": 10**299, "longest_edge": 10}}, "size.shortest_edge = 1000"),
        ({"image_mean": "x" * 10**6}, 'image_mean = "xxx'),
    ],
)
def test_preprocessor_that_does_not_go_with_the_model_is_refused(
    change: dict[str, Any], word: str, folder: Path, model: ModelMetadata
) -> None:
    edit_json(folder / "preprocessor_config.json", lambda fields: fields.update(change))
    refused(folder, model, "preprocessor_config.json does not go with the model", word)
    fields = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    refused(folder, model, "processor_config.json: image_processor does not go", word)


def without_image(tokens: dict[str, Any]) -> None:
    tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["id"] != IMAGE]


def larger(tokens: dict[str, Any]) -> None:
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 263, "content": "<|more|>"})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without_image, "no added token for image_token_id = 5"),
        (larger, "token ids up to 263"),
        (lambda tokens: tokens.pop("model"), "tokenizer.json is not a tokenizer"),
    ],
)
def test_tokenizer_that_does_not_go_with_the_model_is_refused(
    change: Callable[[dict[str, Any]], object], word: str, folder: Path, model: ModelMetadata
) -> None:
    edit_json(folder / "tokenizer.json", change)
    refused(folder, model, word)


def endless(tokens: dict[str, Any]) -> None:
    tokens["normalizer"] = {"type": "Prepend", "prepend": "x" * 5000}


@pytest.mark.parametrize("added", [{}, {"eos_token": "<|new|>"}])
def test_tokenizer_that_blows_texts_up_is_refused(added: dict[str, Any], folder: Path, model: ModelMetadata) -> None:
    edit_json(folder / "tokenizer.json", endless)
    (folder / "tokenizer_config.json").write_text(json.dumps(added))
    refused(folder, model, "tokenizer.json: normalizer makes a text 5000 times longer")


FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["[]", "null", '"x"', "5", "{", "[" * 100_000, '{"a":' * 100_000, b"\xff{}"])
def test_damaged_files_are_refused_in_one_line(
    name: str, text: str | bytes, folder: Path, model: ModelMetadata
) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, model, name)


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_pipes_links_and_giants_are_refused_in_one_line(name: str, folder: Path, model: ModelMetadata) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, model, f"{name} is not a regular file")
    (folder / name).unlink()
    secret = folder.parent / "secret"
    secret.write_text("{}")
    (folder / name).symlink_to(secret)
    refused(folder, model, f"{name} is a link to")
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(4 << 30)
    refused(folder, model, f"{name} has more than")


def test_image_token_of_the_tokenizer_is_that_of_the_config(folder: Path, model: ModelMetadata) -> None:
    (folder / "tokenizer_config.json").write_text('{"image_token": "<|video_pad|>"}')
    refused(folder, model, "image_token = '<|video_pad|>'", "image_token_id = 5", "<|image_pad|>")


def test_tokens_around_an_image_are_those_of_the_tokenizer(folder: Path, model: ModelMetadata) -> None:
    marked = msgspec.structs.replace(model, image_marks=ImageMarks(begin=(3,), end=(4,)))
    request_files(folder, marked)
    names = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    request_files(folder, marked)
    letter = msgspec.structs.replace(marked, image_marks=ImageMarks(end=(9,)))
    refused(folder, letter, "no added token for image_marks.end = 9")
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"boi_token": "<|video_pad|>"}))
    refused(folder, marked, "boi_token = '<|video_pad|>'", "image_marks.begin = 3", "<|vision_start|>")


def test_tokens_of_images_that_are_known_by_text_are_found_in_the_tokenizer(folder: Path, model: ModelMetadata) -> None:
    texts = {"row_break": "<|vision_start|>", "end": "<|vision_end|>"}
    assert request_files(folder, model, texts).image_marks == ImageMarks(row_break=(3,), end=(4,))
    with pytest.raises(CheckpointError, match=r"no added token '\[IMG_END\]', which images of this model have"):
        request_files(folder, model, texts | {"end": "[IMG_END]"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for m in messages %}{{ m.content }", ("chat_template.jinja", "line 1")),
        ("a constant", ("leaves out the user's text", "a question")),
        (CHAT_TEMPLATE.replace("<|image_pad|>", ""), ("writes 0 image placeholders for the 2 images",)),
        (CHAT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2), ("writes 4 image placeholders for the 2",)),
        (CHAT_TEMPLATE.replace("<|image_pad|>", "<image>"), ("writes 0", "allowed: one <|image_pad|> for each")),
        (CHAT_TEMPLATE + "{{ bos_token }}", ("'bos_token' is undefined", "supported: messages")),
        ("{{ raise_exception('never') }}", ("refuses these messages: never",)),
        ("{{ ''.__class__.__mro__ }}", ("chat_template.jinja",)),
    ],
)
def test_template_that_cannot_work_is_refused(
    text: str, words: tuple[str, ...], folder: Path, model: ModelMetadata
) -> None:
    template(folder, text)
    refused(folder, model, "the chat template of chat_template.jinja", *words)


def test_file_of_the_template_is_named(folder: Path, model: ModelMetadata) -> None:
    (folder / "processor_config.json").write_text('{"chat_template": "{% if %}"}')
    refused(folder, model, "the chat template of processor_config.json cannot be used")


def test_what_a_template_refuses_of_its_own_is_a_note(folder: Path, model: ModelMetadata) -> None:
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    template(folder, text)
    notes = request_files(folder, model).notes
    assert len(notes) == 2
    assert notes[0].startswith("the chat template takes no system messages")
    assert notes[0].endswith("no system role")


def test_templates_that_are_not_taken_are_a_note(folder: Path, model: ModelMetadata) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("x")
    assert request_files(folder, model).notes == ("of the chat templates the default is taken, not tool_use",)


def test_template_variables_reach_the_runtime(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, bundle = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")), tmp_path / "b.moevlm"
    template(folder, "{{ bos_token }}{{ scan_token }}" + CHAT_TEMPLATE.replace("'<|im_end|>\\n'", "eos_token + '\\n'"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "scan_token": "<|vision_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("x")
    built = call("build", folder, "-o", bundle, "--target", "ort-cpu")
    assert built.status == 0, built.err
    assert "note: of the chat templates the default is taken, not tool_use" in built.out
    answered = call("run", bundle, "--prompt", "a", "--max-new-tokens", "1", "--json")
    assert answered.status == 0, answered.err
    plain = len("".join(["<", "<", "<|im_start|>user\n", "a"]))
    assert 0 < json.loads(answered.out)["prompt_tokens"] < plain + 40
