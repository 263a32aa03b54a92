"""Writes tokenizers as Kimi and Mistral publish them, of small vocabularies that are trained here."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_CORPUS = (
    "the cat's cradle isn't theirs, THE CAT'S; we'll have it, WE'LL have it at 12:30, 1234567 times  or   more\n\n"
    "今天天气很好，我们一起去公园。今天的天气 naïve café Ünïcödé Größe straße été\u0301 "
    "int main(void) {\r\n\treturn x_y + 10;\r\n}\r\n 한국어 한국 ไทย ไทย 👩‍👩‍👧 👩‍👧 🇩🇪 🇩🇪 🙂🙂 ١٢٣ Ⅳ ½ ǅ ʰ"
)
_PARTS = (
    *(
        "a",
        "b",
        "the",
        "The",
        "CAT",
        "cat's",
        "'s",
        "'S",
        "'ll",
        "'LL",
        "'ſ",
        "isn't",
        "1",
        "12",
        "1234567",
        "١٢٣",
        "½",
        "Ⅳ",
    ),
    *(
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\u00a0",
        "\u0085",
        "\u3000",
        "\u2028",
        "/",
        "//",
        "{",
        "...",
        "!?",
    ),
    *(
        "今天",
        "天气",
        "々",
        "〇",
        "公园",
        "，",
        "。",
        "한국어",
        "ไทย",
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "ǅ",
        "ʰ",
        "Ü",
        "ß's",
    ),
    *("👩‍👩‍👧", "🙂", "🇩🇪", "\u200d", "\ufe0f", "\x00", "\x7f", "\ufffd", "\U0001f6f8", "\U00020000", "ا", "ﬁ"),
)

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def trained(seed: int = 0, merges: int = 150) -> list[bytes]:
    """Tokens by rank: all bytes in some order, then what pairs of tokens most often are in a corpus, one by one."""
    rng = random.Random(seed)
    tokens = [bytes([byte]) for byte in rng.sample(range(256), 256)]
    words = [[word[i : i + 1] for i in range(len(word))] for word in _CORPUS.replace(" ", "\v ").encode().split(b"\v")]
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        left, right = max(pairs, key=lambda pair: (pairs[pair] + rng.random(), pair))
        if left + right not in tokens:
            tokens.append(left + right)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if word[i] == left and word[i + 1] == right:
                    word[i : i + 2] = [left + right]
                i += 1
    return tokens


def drawn(seed: int = 0, count: int = 150) -> list[bytes]:
    """Tokens by rank that no training would give: many can be made in several ways, and some not at all."""
    rng, corpus = random.Random(seed), _CORPUS.encode()
    tokens = dict.fromkeys(bytes([byte]) for byte in rng.sample(range(256), 256))
    while len(tokens) < 256 + count:
        start = rng.randrange(len(corpus))
        tokens[corpus[start : start + rng.randint(2, 7)]] = None
    return list(tokens)


def texts(seed: int = 0, count: int = 2000) -> list[str]:
    """Random texts of what tokenizers treat in their own way each."""
    rng = random.Random(seed)
    return ["".join(rng.choices(_PARTS, k=rng.randint(1, 12))) for _ in range(count)]


def encoded(token: bytes) -> str:
    """In base64."""
    return base64.b64encode(token).decode()


def write_tiktoken(
    directory: Path, tokens: Sequence[bytes], special: Mapping[int, str], config: Mapping[str, Any] | None = None
) -> None:
    """tiktoken.model, and tokenizer_config.json with the special tokens by id and the fields of `config`."""
    lines = [f"{encoded(token)} {rank}" for rank, token in enumerate(tokens)]
    (directory / "tiktoken.model").write_text("\n".join(lines) + "\n")
    decoder = {str(token_id): {"content": text, "special": True, **FLAGS} for token_id, text in special.items()}
    fields = {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "tokenizer_class": "TikTokenTokenizer",
        **(config or {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))


# Tekken's rule: words by case, digits one by one.
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tekken(tokens: Sequence[bytes], special: Sequence[str] | None, count: int, left_out: int = 0) -> dict[str, Any]:
    """tekken.json with `count` ids for special tokens; the last `left_out` tokens are beyond its vocabulary."""
    vocab = [
        {"rank": rank, "token_bytes": encoded(token), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    config = {
        "pattern": TEKKEN_PATTERN,
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": count + len(tokens) - left_out,
        "default_num_special_tokens": count,
        "version": "v3" if special is None else "v13",
    }
    listed = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special or ())]
    return {"config": config, "vocab": vocab} | ({} if special is None else {"special_tokens": listed})
