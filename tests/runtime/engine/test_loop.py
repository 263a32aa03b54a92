"""Requests that share steps: threads, batches, errors, cancellations and images."""

from __future__ import annotations

import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevlm.runtime.core.errors import Cancelled, EngineError, RequestError
from moevlm.runtime.core.manifest import ModelMetadata
from moevlm.runtime.engine.answer import Piece
from moevlm.runtime.engine.cancellation import Cancellation
from moevlm.runtime.engine.generate import Runtime
from moevlm.runtime.engine.step import EngineLimits, Step
from moevlm.runtime.engine.visual import HostFeatures
from moevlm.runtime.request.candidates import CandidateRow
from moevlm.runtime.request.images.registry import image_processor
from moevlm.runtime.request.prompt import Prompt
from moevlm.runtime.request.sampler import Sampled, Sampler
from moevlm.runtime.request.sampling import SamplingParams
from moevlm.runtime.request.vision_inputs import VisionInputs
from tests.support.paged_engine import IMAGE, MODEL, SEEING_MODEL, PagedEngine, alone, paged_runtime, prompt_of

LIMITS = EngineLimits(8, 128, 8, 2000, 4, packed=True)
PROMPTS = [tuple(range(5 + n, 12 + 3 * n)) for n in range(7)]
FORCED: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}


def ids(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def expected(prompt: tuple[int, ...], **options: Any) -> list[int]:
    params = SamplingParams(**{**FORCED, **options})
    return alone(prompt, params.max_new_tokens, params)


def test_a_batch_shares_steps_and_each_answer_is_what_it_is_alone() -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    params = [SamplingParams(**FORCED, temperature=1.0, top_p=0.9, seed=n) for n in range(7)]
    completions = runtime.generate_many([prompt_of(one) for one in PROMPTS], params=params)
    for completion, prompt, chosen in zip(completions, PROMPTS, params, strict=True):
        assert list(completion.token_ids) == alone(prompt, 12, chosen)
        assert completion.finish_reason == "length"
        assert completion.usage.new_tokens == len(completion.sampled) == 12
    assert max(step.sequences for step in engine.steps) == 7
    assert len(engine.steps) < 7 * 12 / 4
    assert runtime.loop.used_pages == 0


def test_a_batch_is_checked_before_its_first_step() -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    with pytest.raises(RequestError, match="leaves no room"):
        runtime.generate_many([prompt_of([5]), prompt_of([5] * 2000)])
    with pytest.raises(RequestError, match=r"^1 params for 2 requests"):
        runtime.generate_many([prompt_of([5]), prompt_of([6])], params=[SamplingParams()])
    assert engine.steps == []
    assert runtime.generate_many([]) == []


def test_threads_that_share_a_runtime_get_their_own_answers() -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    first = threading.Event()
    waiting = threading.Barrier(len(PROMPTS))

    def hold(*_: object) -> None:
        if not first.is_set():  # until the others have come, or nearly
            first.set()
            waiting.wait(60)

    engine.before = hold

    def read(n: int) -> list[int]:
        answer = runtime.generate(prompt_of(PROMPTS[n]), params=SamplingParams(**FORCED, temperature=1.0, seed=n))
        if n:
            assert first.wait(60)
            threading.Timer(0.05, waiting.wait, [60]).start()
        return ids(list(answer))

    with ThreadPoolExecutor(len(PROMPTS)) as readers:
        answers = list(readers.map(read, range(len(PROMPTS))))
    assert answers == [expected(prompt, temperature=1.0, seed=n) for n, prompt in enumerate(PROMPTS)]
    assert max(step.sequences for step in engine.steps) > 3
    assert runtime.loop.used_pages == 0


def test_an_error_in_one_step_reaches_all_its_requests_and_nothing_else() -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    answers = [runtime.generate(prompt_of(prompt), **FORCED) for prompt in PROMPTS[:3]]
    for answer in answers:
        next(answer)

    def fail(*_: object) -> None:
        raise ValueError("a bug\nof the engine")

    engine.before = fail
    for answer in answers:
        with pytest.raises(EngineError, match=r"^the engine failed: a bug of the engine$"):
            list(answer)
    assert runtime.loop.used_pages == 0
    engine.before = None
    assert ids(list(runtime.generate(prompt_of(PROMPTS[0]), **FORCED))) == expected(PROMPTS[0])


def test_logits_that_are_not_usable_end_their_own_request() -> None:
    class Broken(PagedEngine):
        def forward(self, step: Step, *arguments: Any) -> Any:
            output = super().forward(step, *arguments)
            broken = step.context_len[[n for n in range(step.sequences) if n < len(output.candidates.values)]] == 10
            output.candidates.values[broken, 0] = np.nan
            return output

    runtime = paged_runtime(Broken(LIMITS))
    good, bad = (runtime.generate(prompt_of(prompt), **FORCED) for prompt in ((5,) * 20, (6,) * 6))
    assert next(good)
    with pytest.raises(EngineError, match="not usable"):
        list(bad)
    assert len(list(good)) == 11
    assert runtime.loop.used_pages == 0


def test_a_bug_in_the_choice_of_a_token_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    answers = [runtime.generate(prompt_of(prompt), **FORCED) for prompt in PROMPTS[:3]]
    made = [ids([next(answer)]) for answer in answers]
    choose = Sampler.choose

    def fail(sampler: Sampler, row: CandidateRow) -> Sampled:
        if len(made[0]) == 1 and not failed and engine.steps[-1].sequences == 3:
            failed.append(sampler)
        if sampler in failed:
            raise OverflowError("math range error")
        return choose(sampler, row)

    failed: list[Sampler] = []
    monkeypatch.setattr(Sampler, "choose", fail)
    errors = []
    for n, answer in enumerate(answers):
        try:
            made[n] += ids(list(answer))
        except EngineError as error:
            errors.append(str(error))
        else:
            assert made[n] == expected(PROMPTS[n])
    assert errors == ["the engine failed: math range error"]
    assert runtime.loop.used_pages == 0


def test_pages_of_a_step_that_gave_no_logits_are_not_shared() -> None:
    class Broken(PagedEngine):
        def forward(self, step: Step, *arguments: Any) -> Any:
            output = super().forward(step, *arguments)
            if len(self.steps) == 1:
                self.pages[1:] = -5
                output.candidates.values[:] = np.nan
            return output

    runtime = paged_runtime(Broken(LIMITS))
    with pytest.raises(EngineError, match="not usable"):
        list(runtime.generate(prompt_of(PROMPTS[0]), **FORCED))
    assert ids(list(runtime.generate(prompt_of(PROMPTS[0]), **FORCED))) == expected(PROMPTS[0])


def test_a_step_is_stopped_within_only_when_the_last_of_its_requests_is_cancelled() -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    answers = [runtime.generate(prompt_of(prompt), **FORCED) for prompt in PROMPTS[:3]]
    for answer in answers:
        next(answer)
    stops: list[int] = []

    def cancel(step: Step, cancellation: Cancellation | None) -> None:
        assert cancellation is not None
        if step.sequences == 3:
            with cancellation.stopping(lambda: stops.append(1)):
                for number, answer in enumerate(answers):
                    answer.cancel()
                    assert bool(stops) == (number == 2)
            cancellation.check()

    engine.before = cancel
    for answer in answers:
        list(answer)
    assert stops
    assert runtime.loop.used_pages == 0


def test_cancelling_one_of_a_crowd_leaves_the_others_alone() -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    answers = [runtime.generate(prompt_of(prompt), **FORCED) for prompt in PROMPTS]
    made = [ids([next(answer)]) for answer in answers]

    def cancel(*_: object) -> None:
        if len(engine.steps) == 12:
            answers[2].cancel()

    engine.before = cancel
    for n, answer in enumerate(answers):
        made[n] += ids(list(answer))
        assert made[n] == expected(PROMPTS[n])[: len(made[n])]
        assert n == 2 or len(made[n]) == 12
    assert len(made[2]) < 12
    assert runtime.loop.used_pages == 0


def test_an_interrupt_ends_the_request_of_the_thread_that_it_meets_alone() -> None:
    runtime = paged_runtime(engine := PagedEngine(LIMITS))
    one, other = (runtime.generate(prompt_of(prompt), **FORCED) for prompt in PROMPTS[:2])
    begun = [*ids([next(other)]), *ids([next(one)])][:1]

    def interrupt(step: Step, _: object) -> None:
        if step.sequences == 2:
            engine.before = None
            raise KeyboardInterrupt

    engine.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(one)
    assert begun + ids(list(other)) == expected(PROMPTS[1])
    assert runtime.loop.used_pages == 0


# What the thread that steps does in Python, beside the engine.
BOOKKEEPING = (
    *("loop.py", "scheduler.py", "residents.py", "page_table.py", "pages.py", "rows.py"),
    *("packing.py", "sequence.py"),
)


def interrupted_at(line: int, recurrent: bool) -> tuple[bool, list[list[int]], int]:
    """Two requests of which one is interrupted. Returns (whether it was, tokens of both and of a third, pages used)."""
    runtime = paged_runtime(PagedEngine(LIMITS, recurrent=recurrent), pages=12)
    list(runtime.generate(prompt_of(PROMPTS[0]), **FORCED))
    one, other = (runtime.generate(prompt_of((*PROMPTS[0][:6], n)), **FORCED) for n in (5, 6))
    made = [ids([next(other)]), ids([next(one)])]
    lines = iter(range(line + 1))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if Path(frame.f_code.co_filename).name not in BOOKKEEPING or frame.f_code.co_name in ("next_piece", "_turn"):
            return trace if event == "call" else None
        if event == "line" and next(lines, None) == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    try:
        sys.settrace(trace)
        made[1] += ids(list(one))
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    finally:
        sys.settrace(None)
    one.close()
    try:
        made[0] += ids(list(other))
    except EngineError as error:  # it was this one's turn to choose a token
        assert "KeyboardInterrupt" in str(error)
        made[0] += expected((*PROMPTS[0][:6], 6))[len(made[0]) :]
    made.append(ids(list(runtime.generate(prompt_of(PROMPTS[0]), **FORCED))))
    return interrupted, made, runtime.loop.used_pages


@pytest.mark.parametrize("recurrent", [False, True], ids=["pages", "pages and rows"])
def test_an_interrupt_at_any_place_changes_no_other_answer(recurrent: bool) -> None:
    wanted = [expected((*PROMPTS[0][:6], n)) for n in (6, 5)]
    count = 0
    for line in range(0, 100_000, 21):
        interrupted, made, used = interrupted_at(line, recurrent)
        assert made[0] == wanted[0]
        assert made[1] == wanted[1][: len(made[1])]
        assert made[2] == expected(PROMPTS[0])
        assert used == 0
        if not interrupted:
            break
        count += 1
    assert count > 20


def left_at(line: int, recurrent: bool) -> bool:
    """One request is closed while another is, as by a destructor that comes at any line. Returns whether it was."""
    runtime = paged_runtime(PagedEngine(LIMITS, recurrent=recurrent), pages=40)
    first = expected(PROMPTS[0])[0]
    one, other = (runtime.generate(prompt_of(prompt), **FORCED) for prompt in (PROMPTS[0], (*PROMPTS[0], first)))
    for answer in (one, other) * 2:  # both have the same tokens
        next(answer)
    lines = iter(range(line + 1))
    closed = False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal closed
        if Path(frame.f_code.co_filename).name not in BOOKKEEPING:
            return None
        if event == "line" and next(lines, None) == line:
            sys.settrace(None)
            closed = True
            other.close()
        return trace

    sys.settrace(trace)
    try:
        one.close()
    finally:
        sys.settrace(None)
    other.close()
    assert ids(list(runtime.generate(prompt_of(PROMPTS[0]), **FORCED))) == expected(PROMPTS[0])
    assert runtime.loop.used_pages == 0
    runtime.forget()
    pool = runtime.loop._scheduler._all.pool
    assert sorted(pool._free) == list(range(1, pool.pages))
    assert sorted(pool.rows._free) == list(range(1, pool.rows.rows))
    return closed


@pytest.mark.parametrize("recurrent", [False, True], ids=["pages", "pages and rows"])
def test_a_destructor_at_any_place_loses_no_page(recurrent: bool) -> None:
    line = 0
    while left_at(line, recurrent):
        line += 1
    assert line > 30


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8))


def shown(*images: Image.Image, text: tuple[int, ...] = (7, 8)) -> Prompt:
    tokens = [5, *(token for _ in images for token in (6, *[IMAGE] * 6)), *text]
    return Prompt.from_ids(tokens, [(4, 6)] * len(images), MODEL, images)


def seeing(engine: PagedEngine, model: ModelMetadata = MODEL, **options: Any) -> Runtime:
    return Runtime(model, None, None, engine, image_processor(PROCESSOR, MODEL.vision), **options)


def answer_of(runtime: Runtime, prompt: Prompt) -> list[int]:
    return ids(list(runtime.generate(prompt, **FORCED)))


def test_a_repeated_image_is_not_encoded_again() -> None:
    runtime = seeing(engine := PagedEngine(LIMITS))
    a, b = picture(1), picture(2)
    first = answer_of(runtime, shown(a))
    assert len(engine.encoded) == 1
    assert answer_of(runtime, shown(a)) == first
    both = answer_of(runtime, shown(b, a, b, text=(9,)))
    assert len(engine.encoded) == 2
    assert len(engine.encoded[1].pixel_patches) == 24  # the new one, once
    forgetful = seeing(without := PagedEngine(LIMITS), feature_memory=0)
    assert answer_of(forgetful, shown(b, a, b, text=(9,))) == both
    assert answer_of(forgetful, shown(a, text=(10,))) != first
    assert len(without.encoded) == 2


def test_images_whose_tokens_see_each_other_are_not_cut_and_give_the_same_answer_however_they_are_read() -> None:
    prompts = [shown(picture(1), picture(2)), shown(picture(1), picture(3)), shown(picture(1), picture(2), text=(9,))]
    alone = [answer_of(seeing(PagedEngine(LIMITS), SEEING_MODEL), one) for one in prompts]
    assert len({tuple(answer) for answer in alone}) == 3
    assert alone[0] != answer_of(seeing(PagedEngine(LIMITS)), prompts[0])
    runtime = seeing(engine := PagedEngine(LIMITS), SEEING_MODEL, chunk_tokens=4)
    assert [answer_of(runtime, one) for one in (*prompts, *prompts)] == [*alone, *alone]
    assert [step.tokens for step in engine.steps[:3]] == [8, 7, 2]  # behind each image
    narrow = seeing(PagedEngine(replace(LIMITS, max_tokens=12)), SEEING_MODEL)
    with pytest.raises(RequestError, match=r"^an image has 6 tokens, a step of the engine takes up to 5 of one"):
        narrow.generate(prompts[0])


def test_images_that_look_different_never_share_pages() -> None:
    pictures = [picture(seed) for seed in range(4)]
    apart = [answer_of(seeing(PagedEngine(LIMITS)), shown(one)) for one in pictures]
    assert len({tuple(answer) for answer in apart}) == 4
    runtime = seeing(PagedEngine(LIMITS))
    assert [answer_of(runtime, shown(one)) for one in pictures] == apart
    assert [answer_of(runtime, shown(one)) for one in pictures] == apart


def test_requests_that_end_while_an_image_is_encoded_take_nobody_with_them() -> None:
    class Left(PagedEngine):
        def encode(self, inputs: VisionInputs, cancellation: Cancellation | None = None) -> HostFeatures:
            left.cancel()
            looking.cancel()
            return super().encode(inputs, cancellation)

    runtime = seeing(Left(LIMITS))
    stays, left = (runtime.generate(prompt_of(prompt), **FORCED) for prompt in PROMPTS[:2])
    made = [*ids([next(stays)]), *ids([next(left)])][:1]
    looking = runtime.generate(shown(picture(1)), **FORCED)
    assert list(looking) == list(left) == []
    assert made + ids(list(stays)) == expected(PROMPTS[0])
    assert runtime.loop.used_pages == 0


@pytest.mark.parametrize("feature_memory", [0, 1 << 20])
def test_images_are_there_again_after_a_preemption(feature_memory: int) -> None:
    prompts = [shown(picture(seed), text=tuple(range(5, 25))) for seed in range(4)]
    options = {"max_new_tokens": 30, "ignore_eos": True}
    apart = [ids(list(seeing(PagedEngine(LIMITS)).generate(prompt, **options))) for prompt in prompts]
    size = paged_runtime(PagedEngine(LIMITS)).engine.states[0].token_bytes * LIMITS.page_size
    runtime = seeing(engine := PagedEngine(LIMITS), cache_memory=34 * size, feature_memory=feature_memory)
    together = runtime.generate_many(prompts, **options)
    assert [list(completion.token_ids) for completion in together] == apart
    assert sum(step.tokens for step in engine.steps) > sum(len(prompt.ids) + 29 for prompt in prompts)  # some again


def test_the_context_is_what_the_cache_holds() -> None:
    runtime = paged_runtime(PagedEngine(LIMITS), pages=11)
    assert runtime.context == 40
    with pytest.raises(RequestError, match=r"leaves no room in the cache's context of 40 \(a larger cache_memory"):
        runtime.generate(prompt_of([5] * 40))
    assert len(list(runtime.generate(prompt_of([5] * 38), ignore_eos=True))) == 2
    with pytest.raises(RequestError, match=r"^unsupported value cache_memory = 1 \(allowed: \d+ bytes or more, 4 tok"):
        Runtime(MODEL, None, None, PagedEngine(LIMITS), cache_memory=1)


def test_a_request_that_ends_without_its_last_piece_says_so() -> None:
    runtime = paged_runtime(PagedEngine(LIMITS))
    request = runtime.sequence(prompt_of([5]), ahead=math.inf, **FORCED)
    runtime.loop.add(request)
    assert runtime.loop.next_piece(request) is not None
    request.cancellation.cancel()
    with pytest.raises(Cancelled):
        list(runtime._pieces(request))


def test_what_was_kept_is_forgotten_while_others_go_on() -> None:
    runtime = paged_runtime(PagedEngine(LIMITS))
    list(runtime.generate(prompt_of(PROMPTS[1]), **FORCED))
    with ThreadPoolExecutor(2) as readers:
        options = {"max_new_tokens": 1900, "ignore_eos": True}
        busy = [readers.submit(list, runtime.generate(prompt_of(prompt), **options)) for prompt in PROMPTS[2:4]]
        while not runtime.loop.used_pages:
            time.sleep(0.001)
        runtime.forget()
        assert not any(one.done() for one in busy)
        assert [ids(one.result()) for one in busy] == [expected(prompt, **options) for prompt in PROMPTS[2:4]]
