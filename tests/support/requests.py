"""Requests of text and images, and what every bundle that answers them is asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moevlm.export.parity.run import check_parity
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.command_line import call
from tests.support.images import noise


def picture(width: int, height: int, seed: int = 0, **limits: int) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image", "image": noise((width, height), seed), **limits}


def asked(*parts: str | dict[str, Any]) -> list[dict[str, Any]]:
    """One message of a user."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def logprobs(runtime: Runtime, requests: Sequence[Any], tokens: int = 6) -> list[list[float]]:
    """Of the tokens of each answer."""
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, logprobs=3)
    return [[token.logprob for token in answer.sampled] for answer in runtime.generate_many(requests, params=params)]


def assert_alone_as_together(runtime: Runtime, prompt: Prompt) -> None:
    (alone,), together = (logprobs(runtime, [prompt] * count, tokens=4) for count in (1, 2))
    assert together == [alone] * 2


def assert_alone_as_among_others(bundle: Bundle, runtime: Runtime, requests: Sequence[Any]) -> None:
    """Also where the engine has their beginnings from before, and where prompts come in chunks. runtime: cpu:int8."""
    alone = [logprobs(runtime, [request])[0] for request in requests]
    assert len({tuple(each) for each in alone}) == len(requests)
    assert logprobs(runtime, requests) == alone
    for chunk in (16, 33):
        with load_runtime(bundle.directory, "cpu:int8", LoadOptions(threads=1, chunk_tokens=chunk)) as other:
            assert logprobs(other, requests) == alone


def assert_parity(bundle: Bundle, checkpoint: Path, targets: Collection[str]) -> tuple[str, ...]:
    """Every target and its requests pass. Returns what was not compared."""
    report = check_parity(bundle.directory, checkpoint, quick=True)
    assert [check for check in report.checks if not check.passed] == []
    assert {check.step for check in report.checks} >= {*targets, "requests"}
    assert [check.note for check in report.checks if check.step == "requests" and check.compared and check.note] == []
    return report.not_compared


def commands_answer(bundle: Bundle, folder: Path) -> str:
    """`run` with an image, and `inspect`, whose output it returns. folder: to write to."""
    Image.new("RGB", (64, 40), "red").save(folder / "red.png")
    arguments = ["--image", folder / "red.png", "--prompt", "What is this?", "--max-new-tokens", "4", "--verbose"]
    said = call("run", bundle.directory, "--target", "cpu:int8", *arguments)
    assert said.status == 0
    assert "of them image" in said.err + said.out
    told = call("inspect", bundle.directory)
    assert told.status == 0
    return told.out
