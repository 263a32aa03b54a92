"""tokenizer.json out of tiktoken.model and tekken.json: tokens as by the definition, and as transformers has them."""

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
import transformers

from moevlm.export.checkpoint.ranked_tokens import MAX_TOKEN_BYTES
from moevlm.export.checkpoint.tokenizer_files import tokenizer_files
from moevlm.export.families.splitting import KIMI
from moevlm.export.parity.rank_tokenizer import RankTokenizer
from moevlm.runtime.core.errors import CheckpointError
from moevlm.runtime.request.detokenize import StreamDecoder
from moevlm.runtime.request.tokenizer import Tokenizer
from tests.support.ranked_files import TEKKEN_PATTERN, drawn, encoded, tekken, texts, trained, write_tiktoken

BASE = len(trained())
SPECIAL = {BASE: "[BOS]", BASE + 1: "[EOS]", BASE + 2: "<|im_end|>", BASE + 6: "<|media_pad|>", BASE + 9: "[PAD]"}
NAMES = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]"]


def converted(folder: Path, splitting: str = KIMI) -> Tokenizer:
    found = tokenizer_files(folder, splitting)
    assert found is not None
    return Tokenizer(found.text)


def write_tekken(folder: Path, content: dict[str, Any]) -> None:
    (folder / "tekken.json").write_text(json.dumps(content))


def with_special(special: list[str]) -> list[str]:
    """Texts in which special tokens stand, too."""
    rng = random.Random(1)
    found = texts(seed=1, count=300)
    return [text[:4] + rng.choice(special) + text[4:] + rng.choice(special) for text in found]


@pytest.mark.parametrize("tokens", [trained(), trained(seed=1, merges=220), drawn(), drawn(seed=1, count=400)])
@pytest.mark.parametrize("splitting", [KIMI, TEKKEN_PATTERN, r"[\s\S]+"], ids=["kimi", "tekken", "whole texts"])
def test_tokens_are_those_of_the_definition(tokens: list[bytes], splitting: str, tmp_path: Path) -> None:
    special = {len(tokens) + i: text for i, text in enumerate(SPECIAL.values())}
    write_tiktoken(tmp_path, tokens, special)
    ours, theirs = converted(tmp_path, splitting), RankTokenizer(tmp_path, splitting)
    found = [*texts(), *with_special([*special.values()])]
    for text, encoding in zip(found, ours.encodings(found), strict=True):
        assert encoding.ids == theirs(text)["input_ids"], text
        assert ours.decode(encoding.ids, skip_special_tokens=False) == text


def test_ids_in_any_order_are_decoded_as_their_bytes(tmp_path: Path) -> None:
    """Also ids that end inside of a character, at once and one by one."""
    write_tiktoken(tmp_path, trained(), SPECIAL)
    ours, theirs = converted(tmp_path), RankTokenizer(tmp_path, KIMI)
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(BASE + 10) for _ in range(rng.randint(1, 12))]
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip)
        stream = StreamDecoder(ours)
        assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == theirs.decode(ids, True)


def test_special_tokens_keep_their_ids_and_gaps_are_reserved(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, trained(), SPECIAL, NAMES | {"chat_template": "x"})
    found = tokenizer_files(tmp_path, KIMI)
    assert found is not None
    assert (found.named, found.file, found.note) == (
        NAMES,
        "tiktoken.model",
        "tokenizer.json is made of tiktoken.model",
    )
    tokenizer = Tokenizer(found.text)
    reserved = {i: f"<|reserved_token_{i}|>" for i in range(BASE, BASE + 10)}
    assert tokenizer.added == {text: i for i, text in (reserved | SPECIAL).items()}
    assert tokenizer.special == tokenizer.added
    assert tokenizer.largest_id == BASE + 9


def test_a_token_that_is_not_special_keeps_its_flag(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, trained(), SPECIAL)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"][str(BASE + 2)]["special"] = False
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = converted(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>[EOS]")) == "a<|im_end|>"


KIMI_SETS = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    r"[\p{Han}]",
    r"[^\r\n\p{L}\p{N}]",
    r"[^\s\p{L}\p{N}]",
    r"\p{N}",
    r"\s",
    r"(?i:s)",
)


@cache
def known_characters() -> str:
    return "".join(chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs"))


@pytest.mark.parametrize("expression", KIMI_SETS)
def test_sets_of_characters_mean_the_same_to_another_library(expression: str) -> None:
    """Of all characters that Python's tables know; newer ones are known to one library before the other."""
    assert expression in KIMI or expression == "(?i:s)"
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "removed")
    pattern = regex.compile(expression, regex.V1)
    others = "".join(piece for piece, _ in split.pre_tokenize_str(known_characters()))
    assert set(others) ^ set(pattern.sub("", known_characters())) <= {
        "\u0295"
    }  # a letter of lower case, until Unicode 17


@pytest.mark.parametrize("left_out", [0, 30])
@pytest.mark.parametrize("tokens", [trained(), drawn()], ids=["trained", "drawn"])
def test_tekken_has_the_ids_and_texts_of_transformers(tokens: list[bytes], left_out: int, tmp_path: Path) -> None:
    write_tekken(tmp_path, tekken(tokens, MISTRAL, 12, left_out))
    ours, theirs = converted(tmp_path, ""), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.largest_id == len(tokens) + 12 - left_out - 1
    assert ours.special == {token.content: i for i, token in theirs.added_tokens_decoder.items()}
    found = [*texts(), *with_special([*MISTRAL, "<SPECIAL_11>"])]
    assert [e.ids for e in ours.encodings(found)] == theirs(found, add_special_tokens=False)["input_ids"]
    for text in found[-300:]:
        for skip in (False, True):
            ids = ours.encode(text)
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_an_older_tekken_has_the_special_tokens_that_mistral_gave_all(version: str, tmp_path: Path) -> None:
    content = tekken(trained(), None, 1000)
    content["config"]["version"] = version
    write_tekken(tmp_path, content)
    found = tokenizer_files(tmp_path)
    assert found is not None
    special = Tokenizer(found.text).special
    assert [special[text] for text in ("</s>", "[INST]", "[IMG]", "<pad>", "[IMG_END]", "[TOOL_CONTENT]")] == [
        *(2, 3, 10, 11, 13, 19)
    ]
    assert special["<SPECIAL_999>"] == 999
    assert found.named == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def test_names_in_tokenizer_config_go_before_tekken_s(tmp_path: Path) -> None:
    write_tekken(tmp_path, tekken(trained(), MISTRAL, 12))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[/INST]"}))
    found = tokenizer_files(tmp_path)
    assert found is not None
    assert found.named == {"bos_token": "<s>", "eos_token": "[/INST]", "pad_token": "<pad>", "unk_token": "<unk>"}


def test_a_tokenizer_json_goes_before_both(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_tekken(tmp_path, tekken(trained(), MISTRAL, 12))
    (tmp_path / "tiktoken.model").write_text("x")
    (tmp_path / "tokenizer.json").write_text((tiny_checkpoint / "tokenizer.json").read_text())
    found = tokenizer_files(tmp_path)
    assert found is not None
    assert (found.text, found.file) == ((tmp_path / "tokenizer.json").read_text(), "tokenizer.json")


def test_a_tokenizer_json_that_splits_otherwise_than_tekken_is_a_note(tmp_path: Path) -> None:
    """As in Mistral-Small-3.1, of which transformers warns."""
    content = tekken(trained(), MISTRAL, 12)
    write_tekken(tmp_path, content)
    made = tokenizer_files(tmp_path)
    assert made is not None
    (tmp_path / "tokenizer.json").write_text(made.text)
    same = tokenizer_files(tmp_path)
    assert same is not None
    assert (same.text, same.note) == (made.text, "")
    content["config"]["pattern"] = KIMI
    write_tekken(tmp_path, content)
    other = tokenizer_files(tmp_path)
    assert other is not None
    assert other.text == made.text
    assert other.note.startswith("tokenizer.json does not split texts by the expression of tekken.json: some get other")


def refused(folder: Path, told: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        tokenizer_files(folder, KIMI)
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


LINES = [f"{encoded(token)} {rank}" for rank, token in enumerate(trained())]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["a$b= 0", *LINES[1:]], "tiktoken.model, line 1: the token 'a$b=' is not base64"),
        ([*LINES[:5], "YQ 5", *LINES[6:]], "tiktoken.model, line 6: the token 'YQ' is not base64"),
        ([*LINES[:7], *LINES[8:]], "tiktoken.model has 405 tokens, and none of rank 7"),
        ([*LINES, LINES[300].split()[0] + " 406"], "is there twice, first as 300"),
        ([*LINES, f"{encoded(b'zzz')} 300"], "tiktoken.model, line 407: a second token of rank 300"),
        ([*LINES, encoded(b"zzz")], "is not a token in base64 and its rank"),
        ([*LINES, f"{encoded(b'zzz')} -1"], "is not a token in base64 and its rank"),
        ([*LINES, " 406"], "a token of 0 bytes (allowed: 1 to 1024)"),
        ([*LINES, f"{encoded(b'z' * (MAX_TOKEN_BYTES + 1))} 406"], "a token of 1025 bytes (allowed: 1 to 1024)"),
        ([f"{encoded(b'abc')} 0", *LINES[1:]], "tiktoken.model has no token for the byte"),
        ([], "tiktoken.model has no token for the byte 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_tiktoken_model_is_refused_by_its_place(lines: list[str], told: str, tmp_path: Path) -> None:
    assert len(LINES) == 406
    write_tiktoken(tmp_path, trained(), SPECIAL)
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    refused(tmp_path, told)


@pytest.mark.parametrize(
    ("special", "told"),
    [
        ({5: "[BOS]"}, "'[BOS]' with the id 5 does not go with the 406 of tiktoken.model (allowed: other tokens"),
        (
            {10**9 - 1: "[BOS]"},
            "does not go with the 406 of tiktoken.model (allowed: other tokens than these, from 406",
        ),
        ({406: "the"}, "'the' with the id 406 does not go with the 406 of tiktoken.model"),
        ({406: "[BOS]", 408: "[BOS]"}, "tokenizer_config.json has the token '[BOS]' under two ids"),
        ({406: "<|reserved_token_407|>", 408: "[BOS]"}, "has the token '<|reserved_token_407|>' under two ids"),
        ({407: "[BOS]"}, "has 406 tokens, and tokenizer_config.json names no special token with the next id, 406"),
        ({}, "has 406 tokens, and tokenizer_config.json names no special token with the next id, 406"),
    ],
    ids=["an ordinary id", "far away", "an ordinary token", "twice", "a reserved name", "a gap", "none"],
)
def test_special_tokens_that_do_not_go_with_tiktoken_model_are_refused(
    special: dict[int, str], told: str, tmp_path: Path
) -> None:
    write_tiktoken(tmp_path, trained(), special)
    refused(tmp_path, told)


def test_a_tiktoken_model_of_another_family_is_refused(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, trained(), SPECIAL)
    with pytest.raises(
        CheckpointError, match=r"no tokenizer.json, only tiktoken.model, and that does not say how texts are split"
    ):
        tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("vocab"), "tekken.json: vocab = null (allowed: a list)"),
        (lambda t: t["config"].pop("pattern"), "tekken.json: pattern = null (allowed: a text)"),
        (lambda t: t["config"].update(pattern="(a"), "tekken.json makes no tokenizer: tokenizer.json is not"),
        (lambda t: t["config"].update(default_vocab_size=True), "default_vocab_size = true (allowed: a number)"),
        (lambda t: t["config"].update(default_vocab_size=9999), "default_vocab_size = 9999 with default_num_special"),
        (lambda t: t["config"].update(default_num_special_tokens=10**9, default_vocab_size=10**9), "to 4096 special"),
        (lambda t: t["config"].update(default_num_special_tokens=3), "does not go with 7 special and 406 other tokens"),
        (lambda t: t["vocab"][9].update(token_bytes="?"), "tekken.json, vocab[9]: the token '?' is not base64"),
        (lambda t: t["vocab"][9].pop("token_bytes"), "tekken.json, vocab[9]: the token null is not base64"),
        (lambda t: t["vocab"][9].pop("rank"), "tekken.json, vocab[9]: the rank null is not a number from 0 on"),
        (lambda t: t["vocab"][9].update(rank=8), "tekken.json, vocab[9]: a second token of rank 8"),
        (lambda t: t["vocab"][9].update(token_bytes=t["vocab"][8]["token_bytes"]), "is there twice, first as 8"),
        (lambda t: t["vocab"].__setitem__(9, "x"), "tekken.json: vocab[9] is not an object"),
        (lambda t: t["special_tokens"][3].pop("token_str"), "special_tokens[3] is not an object with rank and"),
        (lambda t: t["special_tokens"][3].update(rank=2), "special_tokens[3] is the second of rank 2"),
        (lambda t: t["special_tokens"][6].update(rank=8), "tekken.json has 7 special_tokens, and none of rank 6"),
        (lambda t: t["special_tokens"][3].update(token_str="</s>"), "the special token '</s>' is there twice"),
        (lambda t: t["special_tokens"][3].update(token_str="the"), "the special token 'the' is there twice"),
        (lambda t: t.pop("special_tokens"), "no special_tokens (allowed: up to version v7; config.version = 'v13')"),
    ],
)  # fmt: skip
def test_a_damaged_tekken_json_is_refused_by_its_place(
    change: Callable[[dict[str, Any]], object], told: str, tmp_path: Path
) -> None:
    content = tekken(trained(), MISTRAL, 12)
    change(content)
    write_tekken(tmp_path, content)
    refused(tmp_path, told)
