"""Answers of a model with recurrent states on a real engine, from whatever snapshots there are: the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime import Runtime, SamplingParams, load
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.states import PAGE_SIZE, page_bytes, row_bytes
from moevlm.runtime.engine.answer import Completion
from moevlm.runtime.engine.residents import PROMPT_TAIL
from moevlm.runtime.engine.sequence import Sequence
from moevlm.runtime.request.prompt import Prompt
from tests.support import hybrid
from tests.support.tiny import TinyCheckpoint


@pytest.fixture(scope="module", params=["hybrid", "qwen3_5_moe"])
def bundle(
    request: pytest.FixtureRequest,
    hybrid_family: None,  # noqa: ARG001 - which it registers
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """cpu:int8 of the family made for tests, and of Qwen3.5."""
    from moevlm.export.build import build

    root = tmp_path_factory.mktemp("recurrent")
    if request.param == "hybrid":
        checkpoint = hybrid.save(root / "checkpoint", ("wide", "recurrent", "local", "recurrent"))
    else:
        checkpoint = TinyCheckpoint(request.param, side_files=True).save(root / "checkpoint")
    return build(checkpoint, root / "recurrent.moevlm", ["cpu:int8"]).directory


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[Runtime]:
    with load(bundle, "cpu:int8") as loaded:
        yield loaded


def params(seed: int, new_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=1.0, top_p=0.9, seed=seed, logprobs=2)


def prompt_of(runtime: Runtime, ids: list[int]) -> Prompt:
    return Prompt.from_ids(ids, [], runtime.model)


def answer(runtime: Runtime, asked: Any, seed: int = 0, new_tokens: int = 12) -> Completion:
    return Completion.of(list(runtime.generate(asked, params=params(seed, new_tokens))))


def afresh(runtime: Runtime, asked: Any, seed: int = 0) -> Completion:
    """With nothing known before or after."""
    runtime.forget()
    try:
        return answer(runtime, asked, seed)
    finally:
        runtime.forget()


@contextmanager
def counted(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each step computes."""
    tokens: list[int] = []
    forward = runtime.engine.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            runtime.engine, "forward", lambda step, *rest: (tokens.append(step.tokens), forward(step, *rest))[1]
        )
        yield tokens


def test_a_chat_of_many_turns_computes_each_token_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    ids: list[int] = rng.integers(9, 200, 70).tolist()
    expected = []
    for turn in range(4):
        expected.append((list(ids), afresh(runtime, prompt_of(runtime, ids), turn)))
        ids += [*expected[-1][1].token_ids, *rng.integers(9, 200, 20).tolist()]
    known = 0
    for turn, (asked, alone) in enumerate(expected):
        with counted(runtime, monkeypatch) as tokens:
            got = answer(runtime, prompt_of(runtime, asked), turn)
        assert got.sampled == alone.sampled
        assert sum(tokens) == len(asked) - known + 11
        known = len(asked) + 11  # nothing is computed after the last token


def test_a_history_without_its_last_answer_goes_on_from_the_prompt(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(4).integers(9, 200, 340).tolist()
    other = [*ids[:336], 30, 31, 32]
    alone = afresh(runtime, prompt_of(runtime, other))
    answer(runtime, prompt_of(runtime, ids))
    with counted(runtime, monkeypatch) as tokens:
        assert answer(runtime, prompt_of(runtime, other)).sampled == alone.sampled
    assert tokens[0] == len(other) - 5 * PAGE_SIZE


def test_nothing_behind_an_image_is_known_once_the_image_is_another(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def messages(seed: int) -> list[dict[str, Any]]:
        picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8))
        content = [{"type": "text", "text": "See: " * 20}, {"type": "image", "image": picture}]
        return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it? " * 20}]}]

    prompt = runtime.prompt(messages(0))
    place = int(np.flatnonzero(prompt.visual_index >= 0)[0])
    assert place > PAGE_SIZE
    alone = [afresh(runtime, messages(seed)) for seed in range(2)]
    assert alone[0].token_ids != alone[1].token_ids
    computed = []
    for seed in (0, 1, 0, 1):
        with counted(runtime, monkeypatch) as tokens:
            assert answer(runtime, messages(seed)).sampled == alone[seed].sampled
        computed.append(sum(tokens) - 11)
    assert computed[0] == computed[1] == len(prompt.ids)  # no snapshot was made before the image
    assert max(computed[2:]) < PAGE_SIZE + PROMPT_TAIL


def test_a_thousand_random_steps_in_a_small_cache_change_no_answer(runtime: Runtime, bundle: Path) -> None:
    """Turns that go on from others, cancellations, slow readers, failures and too few pages and rows."""
    rng = np.random.default_rng(5)
    begin: list[int] = rng.integers(9, 200, 280).tolist()
    states = runtime.engine.states
    memory = 2 * max(9 * page_bytes(states), 6 * row_bytes(states))
    asked: list[tuple[Sequence, list[int], int]] = []
    with load(bundle, "cpu:int8", cache_memory=memory) as small:
        loop, forward, steps = small.loop, small.engine.forward, 0

        def failing(step: Any, *rest: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps % 97 == 0:
                raise (EngineError if steps % 2 else KeyboardInterrupt)("broken")
            return forward(step, *rest)

        small.engine.forward = failing
        while steps < 1000:
            choice = rng.random()
            if choice < 0.1 and sum(one.status != "ended" for one, *_ in asked) < 6:
                ended = [(one, ids) for one, ids, _ in asked[-8:] if one.status == "ended"]
                if ended and rng.random() < 0.6:  # the next turn, with all of the answer or less
                    one, ids = ended[rng.integers(len(ended))]
                    ids = [*ids, *one.generated[: rng.integers(0, 13)]]
                else:
                    ids = begin[: rng.integers(0, 281)]
                ids = [*ids, *rng.integers(9, 200, rng.integers(1, 40)).tolist()][:400]
                seed, ahead = int(rng.integers(4)), [2.0, 1e9][int(rng.integers(2))]
                asked.append((small.sequence(prompt_of(small, ids), params=params(seed), ahead=ahead), ids, seed))
                loop.add(asked[-1][0])
            elif choice < 0.13 and asked:
                loop.leave(asked[int(rng.integers(max(len(asked) - 6, 0), len(asked)))][0])
            elif choice < 0.5 and asked:
                one = asked[int(rng.integers(max(len(asked) - 6, 0), len(asked)))][0]
                while one.pieces:
                    loop.take(one)
            else:
                steps += 1
                try:
                    loop.step()
                except KeyboardInterrupt:
                    continue
        for one, *_ in asked:
            loop.leave(one)
        assert loop.used_pages == 0
    assert len(asked) > 40
    assert sum(one.finished for one, *_ in asked) > 20
    for one, ids, seed in asked:
        if one.generated:
            expected = answer(runtime, prompt_of(runtime, ids), seed)
            assert one.generated == list(expected.token_ids)[: len(one.generated)]
