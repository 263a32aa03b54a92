"""Bad images, prompts, options and usage: status 2, and one line that says what is wrong and what is allowed."""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from moevlm.runtime import load
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import BundleError, RequestError, shown
from moevlm.runtime.core.installation import install_command
from moevlm.runtime.perf import machine
from tests.support.bundles import copy_bundle
from tests.support.command_line import assert_refused, call, refused_run, spawn


def png(width: int, height: int) -> bytes:
    """A white 1-bit PNG: a gigapixel takes a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    row = b"\0" + b"\xff" * (-(-width // 8))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * height))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GIF87 is what I would like to be", ("is not a PNG, JPEG, WebP, BMP or GIF image",)),
        (b"", ("is not a PNG, JPEG, WebP, BMP or GIF image",)),
        (png(64, 64)[:50], ("damaged or incomplete",)),
        (png(4000, 8), ("4000 x 8", "more than 200 times")),
    ],
    ids=["text", "empty", "cut", "elongated"],
)
def test_file_that_is_no_usable_image(
    content: bytes, words: tuple[str, ...], tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    refused_run(tiny_bundle, "--prompt", "Hi", "--image", path, words=words)


def test_image_that_does_not_exist(tiny_bundle: Path, tmp_path: Path) -> None:
    refused_run(tiny_bundle, "--prompt", "Hi", "--image", tmp_path / "no.png", words=("no.png", "does not exist"))
    refused_run(tiny_bundle, "--prompt", "Hi", "--image", tmp_path, words=(str(tmp_path), "is not a file"))
    refused_run(tiny_bundle, "--prompt", "Hi", "--image", "http://x/a.png", words=("URLs are not fetched",))
    refused_run(tiny_bundle, "--prompt", "Hi", "--image", "x" * 300, words=("File name too long",))
    uri = b'[{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,%s"}]}]' % (b"A" * 10**5)
    refused_run(tiny_bundle, "--messages", "-", stdin=uri, words=("is a data URI, not a file", "image_url"))


def test_image_of_100_megapixels_needs_a_higher_limit(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png(10_000, 10_000))
    assert path.stat().st_size < 100_000
    arguments = (tiny_bundle, "--prompt", "Hi", "--max-new-tokens", "1", "--image", path)
    refused_run(*arguments, words=("huge.png", "10000 x 10000 pixels", "at most 50000000 pixels"))
    assert call("run", *arguments, "--max-image-megapixels", "100").status == 0
    path.write_bytes(png(100, 100))
    refused_run(*arguments, "--max-image-megapixels", "0.009", words=("100 x 100 pixels", "at most 9000 pixels"))


# Requests.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("chunk_tokens", value) for value in (0, True, "8")),
        *(("max_image_pixels", value) for value in (0, 1e6, None)),
        *(("max_image_tokens", value) for value in (0, 2.5, "8")),
        *(("threads", value) for value in (0, True, 1.0, len(os.sched_getaffinity(0)) + 1)),
    ],
)
def test_bad_argument_of_load_is_refused_before_anything_is_read(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"^unsupported value {name} = {re.escape(shown(value))} \(allowed: "):
        load(tmp_path / "nowhere", **{name: value})


def test_small_files_are_read_before_the_engine_is_verified(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    monkeypatch.setattr(Bundle, "verify", lambda *_: pytest.fail("verified"))
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor.json"):
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content + b" ")
        with pytest.raises(BundleError, match=rf"{name} is damaged"):
            load(bundle)
        (bundle / name).write_bytes(content)


def test_empty_prompt(tiny_bundle: Path) -> None:
    for prompt in ("", " \n"):
        refused_run(tiny_bundle, "--prompt", prompt, words=("the prompt is empty",))
    refused_run(tiny_bundle, "--prompt", "-", words=("the prompt is empty",))


def test_prompt_longer_than_the_context(tiny_bundle: Path) -> None:
    context = Bundle.open(tiny_bundle).manifest.model.context
    refused_run(tiny_bundle, "--prompt", "7" * context, words=("tokens", f"the model's context {context}"))


def test_bench_longer_than_the_context(tiny_bundle: Path) -> None:
    context = Bundle.open(tiny_bundle).manifest.model.context
    result = call("bench", "latency", tiny_bundle, "--prompt-tokens", str(context - 10), "--image-size", "0")
    assert_refused(result, f"{context - 10} prompt tokens and 64 new ones", f"context of {context}")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--threads", 5000, ("threads = 5000 (allowed: 1 to",)),
        ("--prompt-tokens", 10**18, (f"{10**18} prompt tokens", "context of")),
        ("--new-tokens", 10**18, (f"{10**18} new ones", "context of")),
        ("--image-size", 10**9, ("a whole number from 0 to 4096",)),
        ("--repeats", 10**9, ("a whole number from 1 to 1000",)),
    ],
)
def test_bench_checks_counts_before_anything_is_as_large(
    tiny_bundle: Path, option: str, value: int, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "measure_machine", lambda _: pytest.fail("the machine was measured"))
    assert_refused(call("bench", "latency", tiny_bundle, "--image-size", "0", option, str(value)), *words)


def test_prompt_that_is_not_unicode(tiny_bundle: Path) -> None:
    refused_run(tiny_bundle, "--prompt", "-", stdin=b"ok \xff", words=("standard input is not UTF-8", "byte 3"))
    assert_refused(spawn("run", tiny_bundle, "--prompt", os.fsdecode(b"ok \xff")), "--prompt is not UTF-8 text")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--temperature", "-1", "a number from 0 to 100"),
        ("--temperature", "nan", "a number from 0 to 100"),
        ("--top-p", "0", "a number above 0, up to 1"),
        ("--max-new-tokens", "0", "a whole number from 1"),
        ("--seed", "-1", "a whole number from 0"),
        ("--chunk-tokens", "0", "1 or more"),
        ("--stop", "", "--stop = '' (allowed: text of 1 to"),
        ("--threads", "0", "--threads = 0 (allowed: a whole number, 1 or more)"),
        ("--max-image-megapixels", "nan", "above 0"),
    ],
)
def test_option_out_of_range(option: str, value: str, allowed: str, tiny_bundle: Path) -> None:
    name = option.removeprefix("--").replace("-", "_")
    result = call("run", tiny_bundle, "--prompt", "Hi", option, value)
    assert_refused(result, allowed)
    assert name in result.err.replace("-", "_")


@pytest.mark.parametrize("options", [["--top-k", "5"], ["--top-p", "1"], ["--min-p", ".1"], ["--seed", "0"]])
def test_options_of_sampling_need_a_temperature(options: list[str], tiny_bundle: Path) -> None:
    for temperature in ([], ["--temperature", "0"]):
        refused_run(tiny_bundle, "--prompt", "Hi", *temperature, *options, words=(f"{options[0]} needs --temperature",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", ("--messages is not valid JSON",)),
        (b"\xff\xff", ("--messages is not valid JSON",)),
        (b"{}", ("messages = {} (allowed: a list of {role, content}",)),
        (b'[{"role": "king", "content": "Hi"}]', ("messages[0].role = 'king'", "allowed: assistant, system, user")),
        (b'[{"role": "user", "content": [{"type": "image", "image": 5}]}]', ("image is 5", "a path")),
        (b'[{"role": "user", "content": [{"type": "film"}]}]', ("messages[0].content[0].type = 'film'", "allowed:")),
    ],
)
def test_bad_messages(content: bytes, words: tuple[str, ...], tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_bytes(content)
    refused_run(tiny_bundle, "--messages", path, words=words)


# Usage.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], ("no such command 'bogus'", "moevlm --help")),
        (["run"], ("missing argument 'BUNDLE'", "moevlm run --help")),
        (["run", "x"], ("--prompt",)),
        (["run", "x", "--promt", "Hi"], ("--promt", "--prompt")),
        (["run", "x", "--prompt", "Hi", "--temperature", "hot"], ("--temperature", "'hot'")),
        (["run", "x", "--prompt", "Hi", "--logprobs", "2"], ("--logprobs needs --json",)),
        (
            ["run", "x", "--prompt", "Hi", "--template-option", "thinking"],
            ("--template-option = 'thinking' (allowed: NAME=VALUE)",),
        ),
        (["run", "x", "--prompt", "Hi", *["--template-option", "a=1"] * 2], ("--template-option", "a is given twice")),
        (["run", "x", "--prompt", "Hi", "--messages", "-"], ("--messages stands alone",)),
        (["run", "x", "--prompt", "Hi", "--max-image-tokens", "5"], ("--max-image-tokens needs an image",)),
        (["run", "x", "--messages", "nowhere.json"], ("--messages", "'nowhere.json'")),
        (["build", "x", "-o", "y", "--checkpoint", "z"], ("either CHECKPOINT -o BUNDLE",)),
        (["build", "x"], ("missing -o BUNDLE", "--checkpoint CHECKPOINT")),
        (["build", "x", "-o", "y", "--expert-layout", "odd"], ("'odd'", "auto", "out_in", "in_out")),
        (["parity", "x"], ("missing option '--checkpoint'",)),
        (["parity", "x", "--checkpoint", "y", "--json", "nowhere/out.json"], ("--json", "'nowhere'")),
        (["bench", "latency", "x", "--new-tokens", "1"], ("--new-tokens = 1 (allowed: a whole number, 2 or more)",)),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line_too(
    arguments: list[str], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(call(*arguments), *words)
    assert not list(tmp_path.iterdir())


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else pytest.fail(name))
    assert_refused(call("build", tmp_path, "-o", tmp_path / "x"), "needs torch", install_command("export"))


def test_results_that_cannot_be_written(tiny_bundle: Path) -> None:
    sizes = ("--prompt-tokens", "2", "--new-tokens", "2", "--repeats", "1", "--image-size", "0")
    result = call("bench", "latency", tiny_bundle, *sizes, "--json", "/dev/full")
    assert (result.status, len(result.errors)) == (2, 1)
    assert result.errors[0] == "error: cannot write /dev/full: No space left on device"


@pytest.mark.parametrize("position", [0, 3], ids=["first", "last"])
def test_debug_shows_the_traceback_and_the_line(position: int, tmp_path: Path) -> None:
    arguments = ["run", str(tmp_path), "--prompt=Hi"]
    result = call(*arguments[:position], "--debug", *arguments[position:])
    assert result.status == 2
    assert result.err.startswith("Traceback (most recent call last):")
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in call(*arguments).err


def test_messages_are_refused_before_an_engine_is_loaded(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moevlm.runtime.loading.load_engine", lambda *_: pytest.fail("the engine was loaded"))
    messages, part = tmp_path / "messages.json", {"type": "image", "image": str(tmp_path / "absent.png")}
    messages.write_text(json.dumps([{"role": "user", "content": [part]}]))
    assert_refused(call("run", tiny_bundle, "--messages", messages), "absent.png' does not exist")
    assert_refused(
        call("run", tiny_bundle, "--prompt", "<|image_pad|>"), "messages[0].content has <|image_pad|> as text"
    )
