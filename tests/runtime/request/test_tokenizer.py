"""Limits of a tokenizer: texts that cannot fit, files that blow texts up, panics of the library, and other threads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from moevlm.runtime.core.errors import BundleError, RequestError
from moevlm.runtime.request.tokenizer import Tokenizer
from tests.runtime.request.test_chat import CORE, TOKENIZER


def changed(**parts: Any) -> Core:
    core = Core.from_str(CORE.to_str())
    for name, part in parts.items():
        setattr(core, name, part)
    return core


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Prepend("a" * 1_000_000)},
        {"normalizer": normalizers.Replace("a", "b" * 65)},
        {"normalizer": normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)},
        {"decoder": decoders.Replace("a", "b" * 65)},
        {"decoder": decoders.Sequence([decoders.Replace("a", "aa"), decoders.Fuse()] * 40)},
    ],
    ids=["prepend", "replace", "sequence", "decoder", "decoders"],
)
def test_tokenizer_that_blows_texts_up_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"^tokenizer\.json: (normalizer|decoder) makes a text \d+ times longer"):
        Tokenizer(changed(**parts).to_str())


def test_usual_normalizers_and_decoders_are_taken() -> None:
    steps = [normalizers.NFC(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core = changed(normalizer=normalizers.Sequence(steps), decoder=decoders.Sequence(parts))
    assert Tokenizer(core.to_str()).encode("user ok") == core.encode("user ok").ids


def test_token_of_many_characters_is_refused() -> None:
    content = json.loads(CORE.to_str())
    content["model"]["vocab"]["x" * 5000] = 500
    with pytest.raises(BundleError, match="a token of 5000 characters"):
        Tokenizer(json.dumps(content))


def test_panic_of_the_library_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    catastrophic = pre_tokenizers.Split(Regex(r"(x+x+)+y"), "isolated")
    tokenizer = Tokenizer(changed(pre_tokenizer=catastrophic).to_str())
    with pytest.raises(RequestError, match="the tokenizer fails on this text") as caught:
        tokenizer.encode("x" * 60)
    assert type(caught.value.__cause__).__name__ == "PanicException"
    assert not isinstance(caught.value.__cause__, Exception)
    assert str(caught.value).isprintable()
    with pytest.raises(RequestError, match="the tokenizer fails on this text"):
        tokenizer.exceeds("x" * 100_000, 50_000)
    capfd.readouterr()  # the library prints its panics


def test_interruption_is_no_error_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def encode_batch(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    tokenizer = Tokenizer(CORE.to_str())
    monkeypatch.setattr(tokenizer, "_core", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


@pytest.mark.parametrize("text", ["a", "user ok ", "\u4eca\u5929", "\U0001f642", "a b\n", "<|im_end|>", "im_start"])
def test_a_text_exceeds_only_counts_that_it_has_more_tokens_than(text: str) -> None:
    for characters in (10, 1000, 400_000):
        long = text * (characters // len(text))
        tokens = len(TOKENIZER.encode(long))
        assert not TOKENIZER.exceeds(long, tokens)
        assert not TOKENIZER.exceeds(long, tokens + 1)
    assert TOKENIZER.exceeds(long, 10)
    assert TOKENIZER.exceeds(long, min(tokens, len(long)) // 2)


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    done = threading.Event()
    turns = 0

    def encode() -> None:
        TOKENIZER.encode("What is on the picture? " * 20_000)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    # Python would let this thread run every 5 ms; a call that kept the lock would let it run at its two ends alone.
    while not done.is_set():
        turns += 1
        done.wait(0.001)
    thread.join()
    assert turns > 10


def test_a_process_that_forks_afterwards_is_not_warned() -> None:
    code = f"""
import os, sys
from moevlm.runtime.request.tokenizer import Tokenizer
tokenizer = Tokenizer({CORE.to_str()!r})
tokenizer.encode("ok")
if os.fork() == 0:
    tokenizer.encode("ok")
    os._exit(0)
print(os.wait()[1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")
