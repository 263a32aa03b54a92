"""A checkpoint's tokenizer in one file: tokenizer.json with the tokens that three other files may add to it.

Where only tiktoken.model or tekken.json is published, tokenizer.json is made of that.

Rules of transformers 5.24 (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend`): docs/checkpoint-files.md.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moevlm.export.checkpoint.files import find, optional_json, read_text
from moevlm.export.checkpoint.tekken_file import TEKKEN, of_tekken, splitting_of
from moevlm.export.checkpoint.tiktoken_file import TIKTOKEN, of_tiktoken
from moevlm.runtime.core.errors import BundleError, CheckpointError, one_line, shown
from moevlm.runtime.request.tokenizer import Tokenizer, library_errors

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_SPECIAL_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_OTHER_KINDS = ("vocab.json", "vocab.txt", "tokenizer.model*", "spiece.model", "*.tiktoken")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """text: tokenizer.json with all tokens. named: what a chat template may use by name, eos_token and others.

    file: what was published, tokenizer.json or another. note: what the user should know, or "".
    """

    text: str
    named: Mapping[str, str]
    file: str = TOKENIZER
    note: str = ""


@dataclass(frozen=True)
class _Token:
    """A token that a file beside tokenizer.json names. flags: those that it says. id: None if it does not say."""

    content: str
    flags: Mapping[str, bool]
    file: str
    id: int | None = None


def tokenizer_files(directory: Path, pattern: str = "") -> TokenizerFiles | None:
    """None for a checkpoint without a tokenizer.

    pattern: how texts are split, as a regular expression of their pieces, for a tiktoken.model, which does not say it;
    empty where it is not known. Raises CheckpointError for a tokenizer of another kind, a file that is malformed, and a
    token whose id is not the one that the tokenizer leads to.
    """
    file = _published(directory)
    if file is None:
        return None
    config = optional_json(directory, CONFIG)
    where = dict.fromkeys(config, CONFIG)
    if config.get("split_special_tokens"):
        raise CheckpointError(f"unsupported value in {CONFIG}: split_special_tokens = true (supported: false)")
    listed: list[_Token] = []
    if "added_tokens_decoder" in config:  # then transformers reads neither of the older files
        listed += _decoder(config["added_tokens_decoder"])
    else:
        special_map = optional_json(directory, _SPECIAL_MAP)
        config, where = config | special_map, where | dict.fromkeys(special_map, _SPECIAL_MAP)
    named = dict(_named(config, where))
    extra = list(_extra(config, where))
    if "added_tokens_decoder" not in config:
        listed += _older(optional_json(directory, _ADDED), {token.content for token in (*named.values(), *extra)})
    names, note = dict[str, str](), ""
    if file == TEKKEN:
        tekken = of_tekken(directory)
        text, names = tekken.text, dict(tekken.named)
    elif file == TIKTOKEN:
        if not pattern:
            raise CheckpointError(
                f"{directory} has no {TOKENIZER}, only {TIKTOKEN}, and that does not say how texts are split "
                "(known: of Kimi's models)"
            )
        text = of_tiktoken(directory, pattern, {token.id: token.content for token in listed if token.id is not None})
    else:
        text = read_text(directory, TOKENIZER)
    if file != TOKENIZER:
        note = f"{TOKENIZER} is made of {file}"
    try:
        Tokenizer(text)  # also that it does not blow texts up, before a token is given to it
    except BundleError as error:
        raise CheckpointError(str(error) if file == TOKENIZER else f"{file} makes no tokenizer: {error}") from error
    if file == TOKENIZER and find(directory, TEKKEN):
        note = _other_splitting(text, splitting_of(directory))
    text = _merged(text, listed, list(named.values()), extra)
    return TokenizerFiles(text, names | {name: token.content for name, token in named.items()}, file, note)


def _published(directory: Path) -> str | None:
    """The file that has the checkpoint's tokenizer. Raises CheckpointError if there are only such as are not read."""
    for name in (TOKENIZER, TIKTOKEN, TEKKEN):
        if find(directory, name):
            return name
    if others := [path.name for kind in _OTHER_KINDS for path in sorted(directory.glob(kind))]:
        raise CheckpointError(
            f"{directory} has no {TOKENIZER}, only {', '.join(others)}: let transformers write it "
            "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    return None


def _other_splitting(text: str, pattern: str | None) -> str:
    """A note if tokenizer.json does not split texts by `pattern`, as some that Mistral published do not."""
    if pattern is None or pattern in _expressions(json.loads(text).get("pre_tokenizer")):
        return ""
    return (
        f"{TOKENIZER} does not split texts by the expression of {TEKKEN}: some get other tokens than in Mistral's own "
        f"code (without {TOKENIZER}, the bundle's is made of {TEKKEN})"
    )


def _expressions(part: Any) -> Iterator[str]:
    """The regular expressions of a part of tokenizer.json."""
    for name, value in part.items() if isinstance(part, dict) else enumerate(part if isinstance(part, list) else ()):
        if name == "Regex":
            yield value
        yield from _expressions(value)


def _decoder(value: Any) -> Iterator[_Token]:
    if not isinstance(value, dict):
        raise _invalid(CONFIG, "added_tokens_decoder", value, "an object of token id to token")
    tokens = []
    for key, token in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and isinstance(token, dict)):
            raise _invalid(CONFIG, f"added_tokens_decoder.{one_line(key, 20)}", token, "an object, under a token id")
        tokens.append(_token(token, CONFIG, f"added_tokens_decoder.{key}", int(key)))
    yield from sorted(tokens, key=lambda token: token.id or 0)


def _older(value: Mapping[str, Any], special: set[str]) -> Iterator[_Token]:
    """added_tokens.json, which has no flags."""
    for content, number in value.items():
        if type(number) is not int or number < 0:
            raise _invalid(_ADDED, content, number, "a token id")
    for content, number in sorted(value.items(), key=lambda item: item[1]):
        flags = {"special": content in special, "normalized": content not in special}
        yield _Token(content, flags, _ADDED, number)


def _named(config: Mapping[str, Any], where: Mapping[str, str]) -> Iterator[tuple[str, _Token]]:
    """eos_token and its like, and the tokens that only this model has a name for."""
    for key, value in config.items():
        named = key in _NAMED or (key.endswith("_token") and isinstance(value, (str, dict)))
        if named and value is not None:
            yield key, _special(_token(value, where[key], key))
    own = config.get("extra_special_tokens")
    for key, value in own.items() if isinstance(own, dict) else ():
        yield key, _special(_token(value, where["extra_special_tokens"], f"extra_special_tokens.{key}"))


def _extra(config: Mapping[str, Any], where: Mapping[str, str]) -> Iterator[_Token]:
    """Tokens without a name. The list is of special ones; yet in tokenizer_config.json their own flag counts."""
    key = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    value = config.get(key) or []
    if isinstance(value, dict):
        return
    if not isinstance(value, list):
        raise _invalid(where[key], key, value, "a list of tokens")
    for number, token in enumerate(value):
        found = _token(token, where[key], f"{key}[{number}]")
        yield _special(found) if where[key] == _SPECIAL_MAP else found


def _token(value: Any, file: str, field: str, number: int | None = None) -> _Token:
    """A token given as its text, or as an object with content and flags."""
    if isinstance(value, str):
        return _Token(value, {"special": True, "normalized": False}, file, number)
    content = value.get("content") if isinstance(value, dict) else None
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if isinstance(value, dict) else {}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise _invalid(file, field, value, f"a token's text, or an object with content, {', '.join(_FLAGS)}")
    return _Token(content, flags, file, number)


def _special(token: _Token) -> _Token:
    return replace(token, flags={**token.flags, "special": True})


def _merged(text: str, listed: list[_Token], named: list[_Token], extra: list[_Token]) -> str:
    """tokenizer.json with the tokens `listed`, as they say, and those of `named` and `extra` that it still lacks."""
    import tokenizers

    core = tokenizers.Tokenizer.from_str(text)
    known = {token.content: token for token in core.get_added_tokens_decoder().values()}
    special, changed = {token.content for token in named}, False
    for token in [*listed, *(token for token in [*named, *extra] if token.content)]:
        added, before = tokenizers.AddedToken(token.content, **token.flags), known.get(token.content)
        # Only tokenizer_config.json's tokens with an id override the flags of tokenizer.json.
        if before is None or (token.file == CONFIG and token.id is not None and repr(before) != repr(added)):
            if token.content in special:
                added = tokenizers.AddedToken(token.content, **{**token.flags, "special": True})
            with library_errors(CheckpointError, f"{token.file}: token {shown(token.content)} cannot be added"):
                core.add_tokens([added])
            known[token.content], changed = added, True
        found = core.token_to_id(token.content)
        if token.id is not None and found != token.id:
            raise CheckpointError(
                f"{token.file} says that token {shown(token.content)} is {token.id}, with {TOKENIZER} it is {found}"
            )
    return str(core.to_str()) if changed else text


def _invalid(file: str, field: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"invalid value in {file}: {one_line(field, 80)} = {shown(value)} (allowed: {allowed})")
