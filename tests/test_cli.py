"""The command line as users meet it: help, text, JSON, exit statuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import moevlm.runtime
from moevlm.export.build import build
from moevlm.export.parity.report import ParityReport
from moevlm.runtime import load
from moevlm.runtime.backends import libraries as native
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.cli.inspect_report import InspectReport
from moevlm.runtime.cli.run_report import RunReport
from moevlm.runtime.core.installation import install_command
from moevlm.runtime.core.printable import printable
from moevlm.runtime.core.reports import Report
from moevlm.runtime.perf.latency_report import BenchReport
from tests.support.bundles import copy_bundle, edit_manifest, rehash
from tests.support.command_line import COMMAND, assert_refused, call, environment, spawn

COMMANDS = ("doctor", "families", "build", "inspect", "parity", "run", "bench", "bench latency")
TOKENS = ("--max-new-tokens", "12")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two PNG files of different sizes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{name}.png" for name in ("wide", "tall")]
    for path, shape in zip(paths, ((16, 40, 3), (32, 24, 3)), strict=True):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return paths


def run(bundle: Path, *arguments: str | Path, stdin: bytes = b"") -> RunReport:
    """`moevlm run --json`, which must succeed and print nothing but the report."""
    result = call("run", bundle, *TOKENS, *arguments, "--json", stdin=stdin)
    assert (result.status, result.err) == (0, "")
    return decode(result.out, RunReport)


def decode(text: str, report: type[Report]) -> Any:
    """A report from JSON, with neither more nor fewer fields than its struct has."""
    decoded = msgspec.json.decode(text, type=report)
    assert json.loads(text) == json.loads(msgspec.json.encode(decoded))
    return decoded


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument_and_explains_every_option(command: str) -> None:
    result = call(*command.split(), "--help")
    assert (result.status, result.err) == (0, "")
    assert f"Usage: moevlm {command} " in result.out
    options = re.findall(r"^  (-.+?)(?:  +(\S.*))?\n(?: {20,}(\S.*))?", result.out, flags=re.M)
    assert options
    assert all(here or below for _, here, below in options), options
    assert max(map(len, result.out.splitlines())) <= 80


def test_help_lists_the_commands_in_the_order_of_use_with_whole_sentences() -> None:
    lines = call("--help").out.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["doctor", "families", "build", "inspect", "parity", "run", "bench"]
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_module_and_script_are_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "moevlm.runtime", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, call("--version").out)
    assert moevlm.runtime.__version__ in done.stdout


def test_shell_completes_the_engines_of_a_bundle(tiny_bundle: Path) -> None:
    words = {
        "_MOEVLM_COMPLETE": "bash_complete",
        "COMP_WORDS": f"moevlm run {tiny_bundle} --target ort",
        "COMP_CWORD": "4",
    }
    done = subprocess.run([COMMAND], capture_output=True, text=True, env=environment() | words)
    assert done.stdout == "plain,ort-cpu\n"
    absent = words | {"COMP_WORDS": "moevlm run nowhere --target ort"}
    done = subprocess.run([COMMAND], capture_output=True, text=True, env=environment() | absent)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert call("--version").out == f"moevlm, version {version('moevlm')}\n"


def test_streamed_text_and_json_agree(tiny_bundle: Path, images: list[Path]) -> None:
    arguments = ("--prompt", "What is this?", "--image", images[0])
    streamed = call("run", tiny_bundle, *arguments, *TOKENS)
    report = run(tiny_bundle, *arguments)
    assert (streamed.status, streamed.err) == (0, "")
    assert streamed.out == report.text + "\n"
    assert report.target == "ort-cpu"
    assert report.new_tokens == len(report.token_ids) == 12
    assert report.finish_reason == "length"
    assert report.logprobs is None
    assert 0 < report.image_tokens < report.prompt_tokens
    assert min(report.vision_seconds, report.prefill_seconds, report.decode_seconds) > 0


def test_text_is_written_as_it_is_made(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moevlm.runtime.cli.main import main
    from moevlm.runtime.engine.answer import Answer, Piece

    events, following = [], Answer.__next__

    class Screen(io.StringIO):
        def flush(self) -> None:
            if events[-1] != self.getvalue():
                events.append(self.getvalue())

    def recorded(self: Answer) -> Piece:
        piece = following(self)
        events.append("piece")
        return dataclasses.replace(piece, text="a")

    monkeypatch.setattr(Answer, "__next__", recorded)
    monkeypatch.setattr(sys, "stdout", Screen())
    main(["run", str(tiny_bundle), "--prompt", "Hi", "--max-new-tokens", "3"])
    assert events == ["piece", "a", "piece", "aa", "piece", "aaa", "aaa\n"]


def test_default_target_and_both_engines_answer_alike(tiny_bundle: Path) -> None:
    reports = [run(tiny_bundle, "--prompt", "Hello", "--target", target) for target in ("reference", "ort-cpu")]
    assert [report.target for report in reports] == ["reference", "ort-cpu"]
    assert reports[0].token_ids == reports[1].token_ids


def test_messages_hold_a_conversation_of_two_turns(tiny_bundle: Path, images: list[Path], tmp_path: Path) -> None:
    first = [{"role": "user", "content": [{"type": "image", "image": str(images[0])}, {"type": "text", "text": "A?"}]}]
    second = [*first, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C?"}]
    reports = []
    for messages in (first, second):
        file = tmp_path / "messages.json"
        file.write_text(json.dumps(messages))
        reports.append(run(tiny_bundle, "--messages", file))
    one, two = reports
    assert one.token_ids == run(tiny_bundle, "--prompt", "A?", "--image", images[0]).token_ids
    assert two.image_tokens == one.image_tokens
    assert two.prompt_tokens > one.prompt_tokens


def test_messages_from_standard_input(tiny_bundle: Path) -> None:
    messages = json.dumps([{"role": "user", "content": "A?"}]).encode()
    assert run(tiny_bundle, "--messages", "-", stdin=messages).token_ids == run(tiny_bundle, "--prompt", "A?").token_ids


def test_prompt_from_standard_input_is_without_the_last_newline(tiny_bundle: Path) -> None:
    piped, given = run(tiny_bundle, "--prompt", "-", stdin="天 ok\n".encode()), run(tiny_bundle, "--prompt", "天 ok")
    assert (piped.prompt_tokens, piped.token_ids) == (given.prompt_tokens, given.token_ids)


def test_two_images_count_twice_and_their_order_matters(tiny_bundle: Path, images: list[Path]) -> None:
    wide, tall = (run(tiny_bundle, "--prompt", "?", "--image", image, "--logprobs", "0") for image in images)
    both, swapped = (
        run(tiny_bundle, "--prompt", "?", "--image", a, "--image", b, "--logprobs", "0")
        for a, b in (images, reversed(images))
    )
    assert both.image_tokens == wide.image_tokens + tall.image_tokens == swapped.image_tokens
    assert both.logprobs != swapped.logprobs


def test_image_tokens_are_limited_on_request(tiny_bundle: Path, images: list[Path], tmp_path: Path) -> None:
    def tokens(*options: str | Path) -> int:
        result = call("run", tiny_bundle, *options, "--max-new-tokens", "1", "--json")
        assert result.status == 0, result.err
        return int(json.loads(result.out)["image_tokens"])

    arguments = ("--prompt", "Hi", "--image", images[0])
    assert tokens(*arguments) > 4 >= tokens(*arguments, "--max-image-tokens", "4") > 0
    part = {"type": "image", "image": str(images[0]), "min_pixels": 64, "max_pixels": 256}
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]))
    assert 0 < tokens("--messages", path) <= 4


def test_a_large_image_is_told_on_a_terminal_before_it_is_encoded(
    tiny_bundle: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moevlm.runtime.core.defaults.LARGE_IMAGE_TOKENS", 3)
    arguments = ("run", tiny_bundle, "--prompt", "Hi", *TOKENS, "--image", images[0])
    assert "--max-image-tokens" not in call(*arguments).err
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    told = re.search(r"images are read as (\d+) tokens; --max-image-tokens N", call(*arguments).err)
    assert told is not None
    assert int(told[1]) > 3
    assert "images are" not in call(*arguments, "--max-image-tokens", "3").err


def test_system_message_is_part_of_the_prompt(tiny_bundle: Path) -> None:
    plain, told = run(tiny_bundle, "--prompt", "Hi"), run(tiny_bundle, "--prompt", "Hi", "--system", "Be brief.")
    assert told.prompt_tokens > plain.prompt_tokens


def test_a_seed_gives_the_same_text_and_another_seed_another(tiny_bundle: Path) -> None:
    texts = [
        run(tiny_bundle, "--prompt", "Hi", "--temperature", "1.5", "--seed", seed).token_ids for seed in ("7", "7", "8")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_filters_leave_only_the_likeliest_token(tiny_bundle: Path) -> None:
    greedy = run(tiny_bundle, "--prompt", "Hi").token_ids
    for option, value in (("--top-k", "1"), ("--top-p", "1e-6"), ("--min-p", "1")):
        assert run(tiny_bundle, "--prompt", "Hi", "--temperature", "2", option, value).token_ids == greedy


def test_command_line_and_python_have_the_same_defaults() -> None:
    from moevlm.runtime import SamplingParams
    from moevlm.runtime.cli.run_command import run as command

    defaults = {option.name: option.default for option in command.params}
    assert defaults["max_new_tokens"] == SamplingParams().max_new_tokens == 256
    assert not isinstance(defaults["chunk_tokens"], int)  # the engine's number
    assert inspect.signature(load).parameters["chunk_tokens"].default is None


def test_stop_string_ends_the_answer_and_is_left_out(tiny_bundle: Path) -> None:
    options = ("--prompt", "Hi", "--temperature", "1", "--seed", "3", "--max-new-tokens", "64")
    whole = run(tiny_bundle, *options)
    ascii_at = next(i for i, char in enumerate(whole.text) if i > 2 and char.isascii() and char.isprintable())
    stop = whole.text[ascii_at]
    stopped = run(tiny_bundle, *options, "--stop", stop, "--stop", "never in there")
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.token_ids == whole.token_ids[: stopped.new_tokens]


def test_logprobs_come_with_the_alternatives_asked_for(tiny_bundle: Path) -> None:
    report = run(tiny_bundle, "--prompt", "Hi", "--logprobs", "3")
    assert report.logprobs is not None
    assert [token.id for token in report.logprobs] == report.token_ids
    for token in report.logprobs:
        assert token.logprob == max(value for _, value in token.top) < 0  # greedy
        assert token.top[0] == (token.id, token.logprob)
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)
        assert len({token_id for token_id, _ in token.top}) == 3


def test_chunks_and_threads_change_nothing_in_the_answer(tiny_bundle: Path, images: list[Path]) -> None:
    arguments = ("--prompt", "What is this?", "--image", images[1])
    expected = run(tiny_bundle, *arguments)
    assert run(tiny_bundle, *arguments, "--chunk-tokens", "5", "--threads", "1").token_ids == expected.token_ids


def test_cache_memory_is_a_size_that_changes_no_answer(tiny_bundle: Path) -> None:
    arguments = ("--prompt", "What is this?", "--target", "reference")
    expected = run(tiny_bundle, *arguments).token_ids
    for size in ("1M", "0.5mib", "2000000"):
        assert run(tiny_bundle, *arguments, "--cache-memory", size).token_ids == expected
    result = call("run", tiny_bundle, *arguments, "--cache-memory", "1")
    assert (result.status, result.out) == (2, "")
    assert re.search(
        r"^error: unsupported value --cache-memory = 1 \(allowed: \d+ bytes or more, 64 tokens\)$", result.err
    )
    for wrong in ("0", "-1", "much", "1X"):
        result = call("run", tiny_bundle, *arguments, "--cache-memory", wrong)
        assert result.status == 2
        assert f"'{wrong}' (allowed: a size, such as 800M or 1.5G)" in result.err


def test_inspect_json_agrees_with_the_manifest(tiny_bundle: Path) -> None:
    result = call("inspect", tiny_bundle, "--json")
    report, manifest = decode(result.out, InspectReport), Bundle.open(tiny_bundle).manifest
    assert (result.status, result.err) == (0, "")
    assert report.bundle == str(tiny_bundle)
    assert report.model == manifest.model
    assert report.source == {name: metadata.sha256 for name, metadata in manifest.source.items()}
    assert report.bytes == sum(
        p.stat().st_size for p in tiny_bundle.rglob("*") if p.is_file() and "manifest" not in p.name
    )
    assert [engine.target for engine in report.engines] == ["ort-cpu", "reference"]
    for engine, folder in zip(report.engines, ("engines/ort-cpu", "graphs"), strict=True):
        assert engine.bytes == sum(path.stat().st_size for path in (tiny_bundle / folder).iterdir())
        assert engine.parity == "not checked"
    assert not report.verified


def test_inspect_verifies_on_request(tiny_bundle: Path) -> None:
    result = call("inspect", tiny_bundle, "--verify", "--json")
    assert (result.status, result.err) == (0, "verifying\n")
    assert decode(result.out, InspectReport).verified


def test_inspect_shows_model_engines_and_what_to_do_next(tiny_bundle: Path) -> None:
    out = call("inspect", tiny_bundle).out
    assert "qwen3_vl_moe" in out
    assert re.search(r"^ort-cpu +float32 +float32 +[\d.]+ [kM]B .* not checked$", out, flags=re.M)
    assert f"next: moevlm parity {tiny_bundle} --checkpoint CHECKPOINT" in out


def test_bench_without_the_operator_library_has_times_and_no_limits(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    sizes = ("--prompt-tokens", "5", "--new-tokens", "2", "--image-size", "0", "--repeats", "1", "--target", "ort-cpu")
    result = call("bench", "latency", tiny_bundle, *sizes, "--json", "-")
    assert result.status == 0
    assert "note: no limits beside the times: cpu_operators was not built" in result.err
    report = decode(result.out, BenchReport)
    assert report.machine is None
    assert report.results[0].decode_limit is None
    refused = call("bench", "latency", tiny_bundle, *sizes, "--plot", tiny_bundle.parent / "roof.png")
    assert (refused.status, refused.out) == (2, "")


def test_bench_asks_for_matplotlib_before_it_measures(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    result = call("bench", "latency", tiny_bundle, "--plot", tiny_bundle.parent / "roof.png")
    assert (result.status, result.out) == (2, "")
    assert result.err == f"error: this command needs matplotlib ({install_command('plot')})\n"


@pytest.mark.parametrize("name", ["roof.svg", "roof", "-"])
def test_bench_refuses_a_plot_of_another_kind_before_it_measures(tiny_bundle: Path, name: str) -> None:
    result = call("bench", "latency", tiny_bundle, "--plot", name)
    assert (result.status, result.out) == (2, "")
    assert result.errors == [
        f"error: unsupported value --plot = '{name}' (allowed: a PNG file: a name that ends in .png)"
    ]


def test_bench_json_agrees_with_its_table(tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "latency.json"
    sizes = ("--prompt-tokens", "20", "--new-tokens", "3", "--image-size", "32", "--repeats", "2")
    options = (*sizes, "--target", "reference", "--target", "ort-cpu")
    result = call("bench", "latency", tiny_bundle, *options, "--json", output)
    assert (result.status, result.err) == (0, "measuring this machine\nmeasuring reference\nmeasuring ort-cpu\n")
    report = decode(output.read_text(), BenchReport)
    assert (report.new_tokens, report.repeats, report.image_size) == (3, 2, 32)
    assert report.prompt_tokens == 20 + report.image_tokens
    assert [r.target for r in report.results] == ["reference", "ort-cpu"]
    rows = {line.split()[0]: line.split() for line in result.out.split("\n\n")[0].splitlines()}
    for r in report.results:
        assert rows[r.target][1:5] == [
            f"{r.vision.median * 1e3:.2f}",
            f"{r.prefill.median * 1e3:.2f}",
            f"{r.prefill_tokens_per_second:.0f}",
            f"{r.first_token.median * 1e3:.2f}",
        ]
        for stage in (r.vision, r.prefill, r.decode_token, r.first_token):
            assert 0 < stage.minimum <= stage.median <= stage.maximum
        assert r.decode_tokens_per_second == pytest.approx(1 / r.decode_token.median)
        assert r.prefill_tokens_per_second == pytest.approx(report.prompt_tokens / r.prefill.median)
    assert max(map(len, result.out.splitlines())) <= 100
    for stage in ("image", "prompt", "token"):
        assert re.search(rf"^ort-cpu {stage} .* \d+% +(memory|arithmetic)$", result.out, re.MULTILINE)


def test_bench_of_a_bundle_without_tokenizer_and_template(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        edit_manifest(bundle, lambda manifest, name=name: manifest["files"].pop(name))
        (bundle / name).unlink()
    sizes = ("--prompt-tokens", "4", "--new-tokens", "3", "--image-size", "32", "--repeats", "1")
    report = decode(call("bench", "latency", bundle, *sizes, "--json", "-").out, BenchReport)
    assert report.results[0].decode_token.median > 0
    assert_refused(call("run", bundle, "--prompt", "Hi"), "the bundle has no tokenizer.json")


def test_bench_without_an_image_prints_json_alone_on_request(tiny_bundle: Path) -> None:
    sizes = ("--prompt-tokens", "4", "--new-tokens", "2", "--image-size", "0", "--repeats", "1")
    report = decode(call("bench", "latency", tiny_bundle, *sizes, "--threads", "1", "--json", "-").out, BenchReport)
    assert report.results[0].vision is None
    assert (report.image_tokens, report.results[0].threads) == (0, 1)


def test_targets_are_added_to_a_bundle_then_parity_passes_and_is_noted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle, output = tmp_path / "a [bold] name.moevlm", tmp_path / "parity.json"
    build(tiny_checkpoint, bundle)
    shown = call("inspect", bundle).out
    assert "no engine yet" in shown
    assert f"next: moevlm build '{bundle}' --checkpoint CHECKPOINT --target cpu:int8" in shown
    built = call("build", bundle, "--checkpoint", tiny_checkpoint, "--target", "ort-cpu")
    assert built.status == 0
    assert f"next: moevlm parity '{bundle}' --checkpoint {tiny_checkpoint}" in built.out
    proved = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--json", output)
    assert proved.status == 0
    assert "parity: passed" in proved.out
    assert f"next: moevlm run '{bundle}' --prompt \"...\" --image FILE" in proved.out
    assert "running transformers" in proved.err
    report = decode(output.read_text(), ParityReport)
    assert report.passed
    assert {check.step for check in report.checks} == {"requests", "canonical PyTorch", "ort-cpu"}
    assert decode(call("inspect", bundle, "--json").out, InspectReport).engines[0].parity == "passed"


def test_parity_suggests_no_run_of_a_bundle_that_takes_no_messages(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    (bundle / "chat_template.jinja").unlink()
    edit_manifest(bundle, lambda manifest: manifest["files"].pop("chat_template.jinja"))
    proved = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", "ort-cpu", "--quick")
    assert proved.out.splitlines()[-1] == "parity: passed, but conversations were not compared"


def test_parity_suggests_no_image_for_a_bundle_that_takes_none(
    tiny_checkpoint: Path, tiny_bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    for name in ("preprocessor.json", "video_preprocessor.json"):
        (bundle / name).unlink()
        edit_manifest(bundle, lambda manifest, name=name: manifest["files"].pop(name))
    lacks = r"^lacks +preprocessor\.json \(takes no images\), video_preprocessor\.json \(takes no videos\)$"
    assert re.search(lacks, call("inspect", bundle).out, flags=re.M)
    proved = call("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", "ort-cpu", "--quick")
    assert "\nNOT COMPARED: images: the checkpoint has no image processor\n" in proved.out
    assert "\nparity: passed, but images were not compared\n" in proved.out
    assert proved.out.splitlines()[-1] == f'next: moevlm run {bundle} --prompt "..."'
    shown = call("run", bundle, "--prompt", "Hi", "--image", images[0])
    assert_refused(shown, "the prompt has 1 image, and the bundle's checkpoint had no image preprocessing")


def test_parity_exits_with_1_and_names_the_engine_that_differs(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path)
    data = bundle / "engines/ort-cpu/decoder.onnx.data"
    weights = np.frombuffer(data.read_bytes(), np.float32).copy()
    weights *= np.float32(1.01)
    data.write_bytes(weights.tobytes())
    rehash(bundle, "engines/ort-cpu/decoder.onnx.data")
    result = spawn("parity", bundle, "--checkpoint", tiny_checkpoint, "--target", "ort-cpu", "--json", "-")
    report = decode(result.out, ParityReport)
    assert (result.status, report.passed) == (1, False)
    assert {check.step for check in report.checks if not check.passed} == {"ort-cpu"}
    assert decode(call("inspect", bundle, "--json").out, InspectReport).engines[0].parity == "failed"
    # Nothing of the libraries' own is among what people see.
    told = result.err.splitlines()
    assert told.pop(1).startswith("parity needs about ")
    assert told == [
        "checking that the bundle came from this checkpoint",
        "comparing requests",
        "running transformers",
        "running canonical PyTorch",
        "running ort-cpu",
    ]


def test_build_prints_progress_and_nothing_of_the_libraries(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = spawn("build", tiny_checkpoint, "-o", tmp_path / "b.moevlm", "--target", "ort-cpu")
    assert (result.status, len(result.out.splitlines())) == (0, 2)
    assert all(re.match("(reading|tracing|writing|hashing) ", line) for line in result.err.splitlines()), result.err


def test_warnings_are_silent_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_bundle: Path
) -> None:
    open_bundle = Bundle.open

    def noisy(path: Path) -> Bundle:
        warnings.warn("of a library", stacklevel=1)
        logging.getLogger("a.library").warning("of a library, too")
        return open_bundle(path)

    monkeypatch.setattr(Bundle, "open", noisy)
    monkeypatch.setattr(sys, "warnoptions", [])
    for options, count in (((), 0), (("--debug",), 1)):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert call("inspect", tiny_bundle, *options).status == 0
        assert (len(warned), len(caplog.records)) == (count, count)


def on_a_terminal(*arguments: str | Path, typed: str = "") -> str:
    """What both outputs show on a terminal of 80 columns. typed: at its keyboard."""
    keyboard, screen = pty.openpty()
    os.write(keyboard, typed.encode())
    with subprocess.Popen(
        [COMMAND, *arguments], stdin=screen, stdout=screen, stderr=screen, env=environment() | {"TERM": "xterm"}
    ) as process:
        os.close(screen)
        impatience = threading.Timer(120, process.kill)
        impatience.start()
        shown = b""
        while True:
            try:
                piece = os.read(keyboard, 65536)
            except OSError:  # Linux's way to say that the other side has closed
                break
            if not piece:
                break
            shown += piece
        impatience.cancel()
    os.close(keyboard)
    assert process.returncode == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


def test_a_quick_run_on_a_terminal_shows_the_text_and_that_it_was_cut(tiny_bundle: Path) -> None:
    shown = on_a_terminal("run", tiny_bundle, "--prompt", "Hi", *TOKENS)
    text = printable(run(tiny_bundle, "--prompt", "Hi").text)
    # A machine under load may take the second after which a notice appears: it is wiped before the text.
    assert shown.endswith(f"{text}\nnote: the answer was cut after 12 tokens (--max-new-tokens)\n")


def test_verbose_says_what_an_answer_cost(tiny_bundle: Path, images: list[Path]) -> None:
    report = run(tiny_bundle, "--prompt", "Hi", "--image", images[0])
    shown = call("run", tiny_bundle, "--prompt", "Hi", "--image", images[0], *TOKENS, "--verbose")
    assert shown.out == report.text + "\n"
    cost = rf"ort-cpu: {report.prompt_tokens} prompt tokens, {report.image_tokens} of them image, in [\d.]+ s; "
    assert re.search(cost + r"12 new tokens, [\d.]+ tokens/s$", shown.err, flags=re.M)
    assert_refused(call("run", tiny_bundle, "--prompt", "Hi", "--json", "-v"), "--verbose is for streamed text")


def test_without_a_prompt_a_terminal_holds_a_conversation(tiny_bundle: Path, images: list[Path]) -> None:
    typed = f"Hi\n/nonsense\n/image {images[0]}\nand this?\n/clear\nHi\n/exit\n"
    shown = on_a_terminal("run", tiny_bundle, *TOKENS, "--system", "Be brief.", "--verbose", typed=typed)
    assert "error: unknown command /nonsense (/help lists them)" in shown
    assert "1 image for the next message" in shown
    counts = [(int(a), int(b)) for a, b in re.findall(r"(\d+) prompt tokens, (\d+) of them image", shown)]
    report = run(tiny_bundle, "--system", "Be brief.", "--prompt", "Hi")
    assert counts[0] == counts[2] == (report.prompt_tokens, 0)  # cleared, the conversation begins anew
    assert counts[1][1] > 0
    assert counts[1][0] > counts[0][0] + counts[1][1]  # it carries what was said before
    assert_refused(call("run", tiny_bundle), "say what to ask")
