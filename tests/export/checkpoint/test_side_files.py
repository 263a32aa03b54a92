"""Chat templates and image processors: of several files the one that transformers takes."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from moevlm.export.checkpoint.side_files import chat_template, preprocessor
from moevlm.runtime.core.errors import CheckpointError

HOMES: dict[str, tuple[str, str]] = {
    "processor": ("processor_config.json", '{"processor_class": "Qwen3VLProcessor", "chat_template": "PROCESSOR"}'),
    "processor, null": ("processor_config.json", '{"chat_template": null}'),
    "processor, named": ("processor_config.json", '{"chat_template": {"default": "OF SEVERAL", "rag": "RAG"}}'),
    "processor, others": ("processor_config.json", '{"chat_template": {"rag": "RAG"}}'),
    "json": ("chat_template.json", '{"chat_template": "JSON"}'),
    "jinja": ("chat_template.jinja", "JINJA {{ 'é' }}"),
    "folder": ("additional_chat_templates/default.jinja", "FOLDER"),
    "folder, other": ("additional_chat_templates/tool_use.jinja", "TOOLS"),
    "tokenizer": ("tokenizer_config.json", '{"chat_template": "TOKENIZER"}'),
    "tokenizer, named": (
        "tokenizer_config.json",
        '{"chat_template": [{"name": "tool_use", "template": "TOOLS"}, {"name": "default", "template": "LISTED"}]}',
    ),
}
GROUPS = [
    [None, "processor", "processor, null", "processor, named", "processor, others"],
    [None, "json"],
    [None, "jinja"],
    [None, "folder"],
    [None, "folder, other"],
    [None, "tokenizer", "tokenizer, named"],
]
REFUSED = "refused"


def of_transformers(directory: Path) -> str | None:
    """What its processor would render with, else its tokenizer."""
    try:
        found = transformers.ProcessorMixin.get_processor_dict(directory)[0].get("chat_template")
    except ValueError:  # both a legacy file and a folder
        return REFUSED
    if found is None:
        found = transformers.PreTrainedTokenizerFast.from_pretrained(directory).chat_template
    return found.get("default", REFUSED) if isinstance(found, dict) else found


def ours(directory: Path) -> str | None:
    try:
        found = chat_template(directory)
    except CheckpointError:
        return REFUSED
    return found.text if found else None


def test_of_all_combinations_of_homes_the_template_is_the_one_of_transformers(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    results = {}
    for homes in itertools.product(*GROUPS):
        directory = tmp_path / "checkpoint"
        directory.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (directory / name).symlink_to(shutil.copyfile(tiny_checkpoint / name, directory / f"copy of {name}"))
        for home in filter(None, homes):
            file, text = HOMES[home]
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_text(text)
        results[homes] = (ours(directory), of_transformers(directory))
        shutil.rmtree(directory)
    assert {homes: pair for homes, pair in results.items() if pair[0] != pair[1]} == {}
    assert len({expected for _, expected in results.values()}) == 9  # every home wins somewhere


@pytest.mark.parametrize("nested", [None, {}, {"image_processor": None}, {"image_processor": {"size": 1}}])
@pytest.mark.parametrize("alone", [None, {"size": 2}])
def test_of_two_image_processors_the_settings_are_those_of_transformers(
    nested: dict[str, Any] | None, alone: dict[str, Any] | None, tmp_path: Path
) -> None:
    for name, content in (("processor_config.json", nested), ("preprocessor_config.json", alone)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    try:
        expected = transformers.ImageProcessingMixin.get_image_processor_dict(tmp_path)[0]
    except OSError:
        expected = None
    found = preprocessor(tmp_path)
    assert (found.fields if found else None) == expected


def test_file_of_the_template_and_names_of_the_others_are_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(HOMES["tokenizer, named"][1])
    found = chat_template(tmp_path)
    assert found is not None
    assert (found.file, found.others) == ("tokenizer_config.json", ("tool_use",))


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("chat_template.json", "{}", "chat_template.json has no text chat_template"),
        ("chat_template.json", "[]", "not a JSON object"),
        ("processor_config.json", '{"chat_template": 3}', "processor_config.json: chat_template is neither text nor"),
        ("tokenizer_config.json", '{"chat_template": [3]}', "tokenizer_config.json: chat_template is neither text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a", "template": "b"}]}', "a text named default"),
        ("processor_config.json", '{"image_processor": []}', "image_processor is not an object"),
        ("preprocessor_config.json", "null", "not a JSON object"),
    ],
)
def test_files_of_another_shape_are_refused_by_name(file: str, text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError) as raised:
        chat_template(tmp_path)
        preprocessor(tmp_path)
    assert word in str(raised.value)
    assert "\n" not in str(raised.value)
