"""One tokenizer.json out of four files: token ids, special flags and names are those of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Core

from moevlm.export.checkpoint.tokenizer_files import tokenizer_files
from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.request.tokenizer import Tokenizer
from tests.support.families.base import SPECIAL, VOCABULARY

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
SCAN, SEG = VOCABULARY, VOCABULARY + 1
DECODER = {
    str(SCAN): {"content": "<scan>", "special": False, **FLAGS},
    str(SEG): {"content": "<|seg|>", "special": True, **FLAGS},
}
ALL_DECODER = {str(i): {"content": token, "special": True, **FLAGS} for i, token in enumerate(SPECIAL)} | DECODER
PADDED = {**FLAGS, "content": " <pad>", "lstrip": True, "rstrip": True}
TEXT = "a <scan> b<|seg|>  <pad> c<|im_end|><|image_pad|>d<scan><s><img>"

Files = dict[str, Any]
VARIANTS: dict[str, Files] = {
    "tokenizer.json alone": {},
    "tokens with their ids": {"tokenizer_config.json": {"added_tokens_decoder": DECODER}},
    "tokens as a Qwen tokenizer has them": {
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": ALL_DECODER}
    },
    "names and a list": {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "pad_token": {"__type": "AddedToken", **PADDED},
            "unk_token": None,
            "extra_special_tokens": ["<|seg|>", {"__type": "AddedToken", "content": "<scan>", **FLAGS}],
        }
    },
    "the older name of the list": {"tokenizer_config.json": {"additional_special_tokens": ["<|seg|>", "<scan>"]}},
    "tokens named by the model": {
        "tokenizer_config.json": {
            "image_token": "<|image_pad|>",
            "scan_token": "<scan>",
            "extra_special_tokens": {"segment_token": "<|seg|>"},
        }
    },
    "an older map of special tokens": {
        "tokenizer_config.json": {"eos_token": "<scan>"},
        "special_tokens_map.json": {
            "eos_token": {**FLAGS, "content": "<|im_end|>"},
            "pad_token": PADDED,
            "additional_special_tokens": ["<|seg|>"],
        },
    },
    "older files beside tokens with ids are not read": {
        "tokenizer_config.json": {"added_tokens_decoder": DECODER, "eos_token": "<|im_end|>"},
        "special_tokens_map.json": {"eos_token": "<s>", "pad_token": "<img>"},
        "added_tokens.json": {"<s>": SCAN},
    },
    "added_tokens.json": {
        "tokenizer_config.json": {"eos_token": "<|seg|>"},
        "added_tokens.json": {"<|seg|>": SEG, "<scan>": SCAN, "<|im_end|>": 2},
    },
    "a token of tokenizer.json with other flags": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": True, **FLAGS, "lstrip": True}}
        }
    },
    "a named token that is not special among those with ids": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": False, **FLAGS, "rstrip": True}},
            "eos_token": "<|im_end|>",
        }
    },
    "a named token among those with ids": {
        "tokenizer_config.json": {"added_tokens_decoder": DECODER, "eos_token": "<scan>", "pad_token": "<img>"}
    },
}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text((tiny_checkpoint / "tokenizer.json").read_text())
    return tmp_path


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("files", VARIANTS.values(), ids=VARIANTS)
def test_ids_text_and_names_are_those_of_transformers(files: Files, folder: Path) -> None:
    write(folder, files)
    qwen = files.get("tokenizer_config.json", {}).get("tokenizer_class") == "Qwen2Tokenizer"
    theirs = (transformers.Qwen2Tokenizer if qwen else transformers.PreTrainedTokenizerFast).from_pretrained(folder)
    found = tokenizer_files(folder)
    assert found is not None
    tokenizer = Tokenizer(found.text)
    ids = tokenizer.encode(TEXT)
    assert ids == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    defaults = {"unk_token", "eos_token", "pad_token"} if qwen else set()
    assert found.named == {name: str(t) for name, t in theirs.special_tokens_map.items() if name not in defaults}


def test_tokenizer_json_without_further_tokens_stays_as_it_is(folder: Path) -> None:
    write(folder, {"tokenizer_config.json": {"eos_token": "<|im_end|>", "additional_special_tokens": list(SPECIAL)}})
    found = tokenizer_files(folder)
    assert found is not None
    assert found.text == (folder / "tokenizer.json").read_text()


def test_a_token_that_is_not_special_any_more_is_text(folder: Path) -> None:
    plain = {"content": "<|im_end|>", "special": False, **FLAGS}
    write(folder, {"tokenizer_config.json": {"added_tokens_decoder": {"2": plain}}})
    found = tokenizer_files(folder)
    assert found is not None
    assert Tokenizer(found.text).decode([2]) == "<|im_end|>"


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer_config.json": {"eos_token": "</s>"}})
    assert tokenizer_files(tmp_path) is None


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken"])
def test_a_tokenizer_of_another_kind_is_refused_with_a_remedy(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, f"no tokenizer.json, only {name}", "save_pretrained")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        tokenizer_files(folder)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"tokenizer_config.json": []}, "tokenizer_config.json is not a JSON object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": 5}}, "added_tokens_decoder = 5"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder.x = {}"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"263": "a"}}}, "added_tokens_decoder.263 = 'a'"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"263": {"content": 7}}}}, 'decoder.263 = {"content": 7}'),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"263": {"content": "a", "special": 1}}}}, '"special": 1'),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<x>"}}}}, "'<x>' is 9, with tokenizer"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"900": {"content": "<x>"}}}}, "it is 263"),
        ({"tokenizer_config.json": {"eos_token": 7}}, "eos_token = 7"),
        ({"tokenizer_config.json": {"eos_token": {"special": True}}}, 'eos_token = {"special": true}'),
        ({"tokenizer_config.json": {"extra_special_tokens": "x"}}, "extra_special_tokens = 'x'"),
        ({"tokenizer_config.json": {"extra_special_tokens": [["a" * 999]]}}, 'extra_special_tokens[0] = ["aaa'),
        ({"tokenizer_config.json": {"split_special_tokens": True}}, "split_special_tokens"),
        ({"special_tokens_map.json": {"pad_token": 7}}, "special_tokens_map.json: pad_token = 7"),
        ({"added_tokens.json": {"<x>": "y"}}, "added_tokens.json: <x> = 'y'"),
        ({"added_tokens.json": {"<x>": 10**30}}, "'<x>' is 1000"),
        ({"tokenizer.json": {"model": 1}}, "tokenizer.json is not a tokenizer"),
    ],
)
def test_malformed_files_are_refused_by_name(files: Files, word: str, folder: Path) -> None:
    write(folder, files)
    refused(folder, word)


def test_what_a_bundle_carries_is_a_tokenizer_json(folder: Path) -> None:
    write(folder, VARIANTS["tokens with their ids"])
    found = tokenizer_files(folder)
    assert found is not None
    assert Core.from_str(found.text).get_vocab_size() == VOCABULARY + 2
