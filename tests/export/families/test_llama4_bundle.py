"""Requests with images to a bundle of Llama 4: tiles with separators, chunks of positions, queries scaled by place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moevlm.export.build import build
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.fakes.gpu import gpu_bundle
from tests.support.families.llama4 import SEPARATORS
from tests.support.gpu_steps import assert_steps_are_those_of_reference
from tests.support.requests import asked, assert_alone_as_among_others, commands_answer, logprobs, picture
from tests.support.tiny import TinyCheckpoint

TOKENS = 4  # visual tokens of a tile, whose side is 16 pixels


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("llama4")
    checkpoint = TinyCheckpoint("llama4", side_files=True, seed=3).save(folder / "checkpoint")
    return build(checkpoint, folder / "tiny.moevlm", ["reference", "ort-cpu", "cpu:int8", "cpu:int4"])


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with load_runtime(bundle.directory, "cpu:int8", LoadOptions(threads=2)) as loaded:
        yield loaded


REQUESTS = [
    asked("hi"),
    asked("what is on ", picture(32, 48, seed=1), " and on ", picture(9, 16, seed=2), "?"),
    asked("more text than a chunk of positions has, and then ", picture(90, 20, seed=3)),
    asked("what is on ", picture(32, 48, seed=1), " and on ", picture(16, 33, seed=4), "?"),
]


def test_prompt_has_tiles_in_rows_with_separators_and_an_overview(runtime: Runtime) -> None:
    model, tokenizer = runtime.model, runtime.tokenizer
    image, across, down = (tokenizer.added[name] for name in SEPARATORS)
    visual, marks = [model.image_token_id] * TOKENS, model.image_marks
    tiled = [*visual, across, *visual, down] * 3
    for part, middle in ((picture(32, 48, seed=1), tiled), (picture(9, 16, seed=2), [])):
        ids = runtime.prompt(asked("a", part, "b")).ids.tolist()
        written = [*marks.begin, *middle, image, *visual, *marks.end]
        start = ids.index(marks.begin[0])
        assert ids[start : start + len(written)] == written


def test_tiles_that_are_too_much_for_an_engine_are_told_by_their_image(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = runtime.prompt(asked(picture(32, 48, seed=1), picture(9, 16, seed=2)))
    assert prompt.sources == ("image 1",) * 7 + ("image 2",)  # six tiles and their overview, and one alone
    monkeypatch.setattr(runtime.engine, "limits", replace(runtime.engine.limits, max_patches=15))
    with pytest.raises(RequestError, match=r"^image 2 needs 16 patches at once, the engine was built for up to 15 "):
        runtime.generate(replace(prompt, images=prompt.images[7:], sources=prompt.sources[7:]))


def test_an_image_has_the_same_numbers_alone_and_among_others(bundle: Bundle, runtime: Runtime) -> None:
    assert_alone_as_among_others(bundle, runtime, REQUESTS)


@pytest.mark.parametrize("target", ["reference", "ort-cpu", "cpu:int4"])
def test_every_engine_answers(target: str, bundle: Bundle) -> None:
    with load_runtime(bundle.directory, target, LoadOptions(threads=2)) as other:
        assert [len(each) for each in logprobs(other, REQUESTS)] == [6] * len(REQUESTS)


def test_steps_on_a_gpu_are_given_the_scales_of_queries(bundle: Bundle, tmp_path: Path) -> None:
    """On a fake GPU that evaluates the canonical graphs."""
    requests = [asked("hi"), asked("on ", picture(32, 32, seed=1), " and ", picture(9, 9, seed=2), "?")]
    directory = gpu_bundle(bundle.directory, tmp_path)
    assert_steps_are_those_of_reference(directory, requests, tmp_path)


def test_commands_answer_and_inspect(bundle: Bundle, tmp_path: Path) -> None:
    told = commands_answer(bundle, tmp_path)
    heads = "4 heads on 2 key-value heads of 16"
    assert f"3 layers: GQA with q/k norms, {heads}, chunks of 16; 1 layer: GQA, {heads}\n" in told
