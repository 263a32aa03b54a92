"""Requests with images to a bundle of Gemma 4, whose image tokens see each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moevlm.export.build import build
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from tests.support.fakes.gpu import gpu_bundle
from tests.support.gpu_steps import assert_steps_are_those_of_reference
from tests.support.requests import asked, assert_alone_as_among_others, commands_answer, picture
from tests.support.tiny import TinyCheckpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("gemma4")
    checkpoint = TinyCheckpoint("gemma4", side_files=True, seed=3).save(folder / "checkpoint")
    return build(checkpoint, folder / "tiny.moevlm", ["reference", "cpu:int8"])


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with load_runtime(bundle.directory, "cpu:int8", LoadOptions(threads=2)) as loaded:
        yield loaded


def pooled(seed: int, tokens: int) -> dict[str, Any]:
    return picture(56, 40, seed, max_pixels=64 * tokens)


REQUESTS = [
    asked("hi"),
    asked("what is on ", pooled(1, 12), " and on ", pooled(2, 30), "?"),
    asked("more text than a window has, and then ", pooled(3, 70)),
    asked("what is on ", pooled(1, 12), " and on ", pooled(4, 20), "?"),
]


def test_prompt_has_marks_around_its_images_and_counted_positions(runtime: Runtime) -> None:
    prompt = runtime.prompt(REQUESTS[1])
    model = runtime.model
    image = prompt.ids == model.image_token_id
    first, last = np.flatnonzero(np.diff(image.astype(int)) == 1), np.flatnonzero(np.diff(image.astype(int)) == -1)
    assert len(first) == 2
    assert set(prompt.ids[first]) == set(model.image_marks.begin)
    assert set(prompt.ids[last + 1]) == set(model.image_marks.end)
    np.testing.assert_array_equal(prompt.positions, [range(len(prompt.ids))] * 3)


def test_an_image_has_the_same_numbers_alone_and_among_others(bundle: Bundle, runtime: Runtime) -> None:
    assert_alone_as_among_others(bundle, runtime, REQUESTS)


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_what_is_left_out_of_the_model_is_refused_in_a_request(kind: str, runtime: Runtime) -> None:
    with pytest.raises(RequestError, match=rf'\.type = .?"?{kind}.* \(allowed: image, '):
        runtime.prompt(asked({"type": kind, kind: "file"}))


def test_steps_on_a_gpu_are_given_what_image_tokens_see(bundle: Bundle, tmp_path: Path) -> None:
    """On a fake GPU that evaluates the canonical graphs."""
    requests = [asked("hi"), asked("on ", pooled(1, 12), " and ", pooled(2, 9), "?"), asked(pooled(3, 16), " is?")]
    directory = gpu_bundle(bundle.directory, tmp_path)
    assert_steps_are_those_of_reference(directory, requests, tmp_path)


def test_commands_answer_and_inspect(bundle: Bundle, tmp_path: Path) -> None:
    commands_answer(bundle, tmp_path)
