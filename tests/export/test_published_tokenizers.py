"""Checkpoints with the tokenizers of Kimi and of Mistral, from their files to an answer in text."""

import json
from pathlib import Path
from typing import Any

import pytest

from moevlm.export.build import build
from moevlm.export.dry_run import dry_run
from moevlm.export.families import family_for
from moevlm.export.families.splitting import KIMI
from moevlm.export.parity.report import Check
from moevlm.export.parity.requests import request_checks
from moevlm.runtime import load
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, CheckpointError
from moevlm.runtime.engine.answer import Completion
from moevlm.runtime.request.prompt import Prompt
from tests.support.bundles import copy_bundle, edit_manifest
from tests.support.command_line import call
from tests.support.families import TINY
from tests.support.ranked_files import tekken, trained, write_tiktoken
from tests.support.tiny import TinyCheckpoint, edit_json

BASE = len(trained())
KIMI_SPECIAL = (
    *("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>"),
)
KIMI_ID = {text: BASE + i for i, text in enumerate(KIMI_SPECIAL)} | {"[UNK]": BASE + 20, "[PAD]": BASE + 21}
KIMI_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_' ~ message['role'] ~ '|>' ~ message['role'] ~ '<|im_middle|>' -}}
  {%- if message['content'] is string -%}{{ message['content'] }}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}<|media_begin|>image<|media_content|><|media_pad|><|media_end|>
      {%- else -%}{{ part['text'] }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]")
MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '[INST]' }}{%- endif %}
    {%- for part in message['content'] %}{{- '[IMG]' if part['type'] == 'image' else part['text'] }}{%- endfor %}
    {{- '[/INST]' if message['role'] == 'user' else eos_token }}
{%- endfor %}
"""
TEXT = "今天天气很好 The cat's 1234567\n\n👩‍👩‍👧 <|im_end|></s> café"


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("kimi")
    checkpoint = TinyCheckpoint(
        "kimi_k25",
        text={"vocab_size": BASE + 22, "eos_token_id": KIMI_ID["<|im_end|>"], "pad_token_id": KIMI_ID["[PAD]"]},
        top={
            "image_token_id": KIMI_ID["<|media_pad|>"],
            "video_token_id": KIMI_ID["[UNK]"],
            "vision_start_token_id": KIMI_ID["<|media_begin|>"],
            "vision_end_token_id": KIMI_ID["<|media_end|>"],
        },
        side_files=True,
    ).save(folder / "checkpoint")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (checkpoint / name).unlink()
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    special = {token_id: text for text, token_id in KIMI_ID.items()}
    write_tiktoken(checkpoint, trained(), special, names | {"chat_template": KIMI_TEMPLATE})
    return checkpoint, build(checkpoint, folder / "tiny.moevlm", ["cpu:int8"]).directory


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, which has a chat template, and its bundle."""
    folder = tmp_path_factory.mktemp("mistral")
    checkpoint = TinyCheckpoint(
        "mistral3",
        text={"vocab_size": BASE + 16, "eos_token_id": 2, "pad_token_id": 5},
        top={"image_token_index": MISTRAL.index("[IMG]")},
        side_files=True,
    ).save(folder / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tekken.json").write_text(json.dumps(tekken(trained(), MISTRAL, 16)))
    (checkpoint / "chat_template.jinja").write_text(MISTRAL_TEMPLATE)
    return checkpoint, build(checkpoint, folder / "tiny.moevlm", ["cpu:int8"]).directory


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def texts_of(checks: list[Check]) -> list[Check]:
    return [check for check in checks if "ids differ" in check.quantity or "typed control" in check.quantity]


@pytest.mark.parametrize("name", ["kimi", "mistral"])
def test_a_bundle_answers_text_as_if_tokenizer_json_had_been_published(
    name: str, request: pytest.FixtureRequest
) -> None:
    _, bundle = request.getfixturevalue(name)
    with load(bundle, "cpu:int8") as runtime:
        prompt = runtime.prompt(question(TEXT))
        assert runtime.tokenizer is not None
        assert TEXT in runtime.tokenizer.decode(prompt.ids.tolist(), skip_special_tokens=False)
        answer = Completion.of(list(runtime.generate(question(TEXT), max_new_tokens=12)))
        assert answer.text == runtime.tokenizer.decode(answer.token_ids)
        assert answer.text
    result = call("run", bundle, "--target", "cpu:int8", "--prompt", TEXT, "--max-new-tokens", "4")
    assert (result.status, result.errors) == (0, [])


def test_parity_holds_kimi_s_tokens_to_the_definition(kimi: tuple[Path, Path]) -> None:
    checkpoint, bundle = kimi
    found = texts_of(request_checks(Bundle.open(bundle), checkpoint, 0, KIMI))
    assert [(check.quantity, check.passed) for check in found] == [
        ("60 conversations whose ids differ", True),
        ("21 typed control tokens that are not text", True),
    ]
    other, _ = texts_of(request_checks(Bundle.open(bundle), checkpoint, 0, KIMI.replace("{1,3}", "")))
    assert (other.passed, other.note[:13]) == (False, "text 0: token")


def test_a_tokenizer_json_beside_code_of_the_checkpoint_counts_in_parity(tmp_path: Path) -> None:
    """A decoder without a tower, whose tokenizer_config.json names a class that only that code has."""
    checkpoint = TinyCheckpoint("kimi_k2", text={"vocab_size": BASE + 22}, side_files=True).save(
        tmp_path / "checkpoint"
    )
    (checkpoint / "tokenizer.json").unlink()
    write_tiktoken(checkpoint, trained(), {token_id: text for text, token_id in KIMI_ID.items()})
    bundle = build(checkpoint, tmp_path / "tiny.moevlm").directory
    assert texts_of(request_checks(Bundle.open(bundle), checkpoint, 0, KIMI))[0].passed
    (checkpoint / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes())
    assert texts_of(request_checks(Bundle.open(bundle), checkpoint, 0))[0].passed


@pytest.mark.parametrize("name", [name for name in TINY if name != "qwen3_omni_moe"])
def test_kimi_s_rule_is_that_of_its_families(name: str) -> None:
    splitting = family_for(TinyCheckpoint(name).config().to_dict()).splitting
    assert splitting == (KIMI if name in ("kimi_k25", "kimi_k2", "deepseek_v3") else "")


def test_parity_holds_tekken_to_transformers(mistral: tuple[Path, Path]) -> None:
    checkpoint, bundle = mistral
    found = texts_of(request_checks(Bundle.open(bundle), checkpoint, 0))
    assert [check.quantity for check in found] == [
        "60 conversations whose ids differ",
        "15 typed control tokens that are not text",
    ]
    assert all(check.passed and not check.note for check in found)


def test_without_a_chat_template_texts_have_tokens_and_messages_are_refused(
    mistral: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint, built = mistral
    bundle = copy_bundle(built, tmp_path)
    (bundle / "chat_template.jinja").unlink()
    edit_manifest(bundle, lambda manifest: manifest["files"].pop("chat_template.jinja"))
    found = request_checks(Bundle.open(bundle), checkpoint, 0)
    assert (found[0].compared, found[0].note) == (False, "the checkpoint has no chat template")
    (texts,) = texts_of(found)
    assert (texts.quantity, texts.passed, texts.note) == ("12 texts whose ids differ", True, "")
    with load(bundle, "cpu:int8") as runtime:
        assert runtime.tokenizer is not None
        ids = runtime.tokenizer.encode(TEXT)
        assert runtime.tokenizer.decode(ids, skip_special_tokens=False) == TEXT
        assert list(runtime.generate(Prompt.from_ids(ids, [], runtime.model), max_new_tokens=2))
        with pytest.raises(BundleError, match=r"the bundle has no chat_template.jinja"):
            runtime.prompt(question(TEXT))


def test_build_and_dry_run_say_what_tokenizer_json_is_made_of(
    kimi: tuple[Path, Path], mistral: tuple[Path, Path]
) -> None:
    for (checkpoint, _), told in (
        (kimi, "tokenizer.json is made of tiktoken.model"),
        (mistral, "tokenizer.json is made of tekken.json"),
    ):
        assert told in dry_run(checkpoint, ["cpu:int8"]).notes


def test_a_tokenizer_that_has_more_tokens_than_the_model_is_refused(kimi: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in kimi[0].iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    edit_json(
        checkpoint / "tokenizer_config.json",
        lambda config: config["added_tokens_decoder"].update({str(BASE + 22): {"content": "<|more|>"}}),
    )
    with pytest.raises(CheckpointError, match=rf"tokenizer.json has token ids up to {BASE + 22}, with the tokens of"):
        dry_run(checkpoint, ["cpu:int8"])
