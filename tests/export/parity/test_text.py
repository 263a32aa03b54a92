"""Perplexity and KL on a text of the user's own, against transformers; files that are no text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from moevlm.export.parity.text import SHORTEST, Text
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import RequestError
from tests.support.bundles import edit_manifest
from tests.support.command_line import call

WORDS = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. "


def test_perplexity_is_that_of_transformers_and_unrounded_engines_keep_it(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle, file, output = tmp_path / "bundle", tmp_path / "text.txt", tmp_path / "report.json"
    shutil.copytree(tiny_bundle, bundle)
    file.write_text(WORDS * 12)
    options = ("--text", file, "--max-tokens", "700", "--target", "ort-cpu", "--json", output)
    result = call("parity", bundle, "--checkpoint", tiny_checkpoint, *options)
    assert result.status == 0, result.err
    assert f"running the engines on {file}" in result.err
    text = json.loads(output.read_text())["text"]
    assert (text["file"], text["tokens"], text["windows"]) == (str(file), 700, 2)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    losses = []
    for window in Text.read(file, Bundle.open(bundle), 700, 512).windows:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(window)[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(window[1:]), reduction="none"))
    assert text["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)
    (engine,) = text["engines"]
    assert engine["engine"] == "ort-cpu"
    assert engine["perplexity"] == pytest.approx(text["perplexity"], rel=1e-5)
    assert 0 <= engine["kl"] < 1e-9
    assert engine["same_first_choice"] == 1
    lines = result.out.splitlines()
    start = lines.index(f"{file}: its first 700 tokens, in 2 windows")
    assert lines[start + 1].split() == ["perplexity", "KL", "same", "first", "choice"]
    assert lines[start + 3].split()[0] == "ort-cpu"


def test_text_is_cut_into_windows_and_a_short_rest_is_left_out(tiny_bundle: Path, tmp_path: Path) -> None:
    file, bundle = tmp_path / "text.txt", Bundle.open(tiny_bundle)
    file.write_text("a" * (512 + SHORTEST - 1))
    assert [len(window) for window in Text.read(file, bundle, 4096, 512).windows] == [512]
    assert [len(window) for window in Text.read(file, bundle, 4096, 300).windows] == [300, 227]
    assert Text.read(file, bundle, 40, 512).tokens == 40


def test_text_that_is_cut_inside_a_character_is_still_utf8(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab" + "€" * 5000)  # three bytes each
    assert Text.read(file, Bundle.open(tiny_bundle), 16, 512).tokens == 16
    file.write_bytes(b"ab" + b"\xff" * 5000)
    with pytest.raises(RequestError, match=r"not UTF-8 \(at byte 2\)"):
        Text.read(file, Bundle.open(tiny_bundle), 16, 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"short", r"has 5 tokens \(allowed: 16 or more\)"),
        ("größer als sieben".encode("latin-1"), r"is not UTF-8 \(at byte 2\)"),
        (b"look: <|image_pad|> and so on and on", r"has the token 5 \(allowed: text tokens below 263\)"),
    ],
)
def test_file_that_is_no_text_is_refused_in_a_line_before_any_work(
    content: bytes, message: str, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    result = call("parity", tiny_bundle, "--checkpoint", tiny_checkpoint, "--text", tmp_path / "text.txt")
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert np.all([part in line for part in ("error: ", "text.txt")])
    with pytest.raises(RequestError, match=message):
        Text.read(tmp_path / "text.txt", Bundle.open(tiny_bundle), 4096, 512)


def test_missing_file_folder_and_bundle_without_tokenizer_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RequestError, match="is no file"):
            Text.read(path, Bundle.open(tiny_bundle), 4096, 512)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "tokenizer.json").unlink()
    edit_manifest(bundle, lambda manifest: manifest["files"].pop("tokenizer.json"))
    with pytest.raises(RequestError, match=r"needs the bundle's tokenizer\.json"):
        Text.read(bundle / "manifest.json", Bundle.open(bundle), 4096, 512)


def test_max_tokens_without_a_text_is_refused(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    result = call("parity", tiny_bundle, "--checkpoint", tiny_checkpoint, "--max-tokens", "99")
    assert result.status == 2
    assert "--max-tokens is for --text" in result.errors[0]
