"""Random traffic: pages are never lost nor written by two, and every sequence gets the tokens that it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moevlm.runtime.core.errors import DeadlineExceeded, EngineError, QueueFull, RequestError
from moevlm.runtime.engine.page_table import Beginning, PageTable
from moevlm.runtime.engine.pages import PagePool
from moevlm.runtime.engine.sequence import Ending, Sequence
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.house import MIXED_TOKENS, House, sequence_of, tokens_of
from tests.support.paged_engine import EOS, IMAGE, alone, prompt_of

PREFIXES = [(), (5, 6, 7, 8), (5, 6, 7, 8, 9, 10, 11, 12, 13), (5, 6, 9), tuple(range(5, 31))]
PROMPTS = st.builds(
    lambda prefix, rest: (*prefix, *rest),
    st.sampled_from(PREFIXES),
    st.lists(st.integers(4, IMAGE - 1), min_size=1, max_size=40).map(tuple),
)
PARAMS = st.builds(
    lambda seed, hot: SamplingParams(temperature=1.0, top_p=0.9, seed=seed) if hot else SamplingParams(),
    st.integers(0, 3),
    st.booleans(),
)


class Traffic(RuleBasedStateMachine):
    @initialize(
        packed=st.booleans(),
        pages=st.integers(18, 40),
        sequences=st.integers(1, 5),
        chunk=st.sampled_from([1, 3, 8, 64]),
        page=st.sampled_from([1, 4, 64]),
        rows=st.sampled_from([0, 2, 3, 5, 12]),
        mixed_tokens=st.sampled_from([None, MIXED_TOKENS]),
    )
    def open(self, pages: int, page: int, **options: Any) -> None:
        self.house = House(pages if page == 4 else pages * 4 if page == 1 else 4, page=page, **options)
        self.sequences: list[tuple[Sequence, tuple[int, ...], int, SamplingParams]] = []
        self.clock = 0.0
        self.first_steps: dict[int, int] = {}
        self.steps = 0

    @rule(
        ids=PROMPTS,
        new_tokens=st.integers(1, 15),
        params=PARAMS,
        ahead=st.sampled_from([1, 2, 1e9]),
        late=st.booleans(),
    )
    def add(self, ids: tuple[int, ...], new_tokens: int, params: SamplingParams, ahead: float, late: bool) -> None:
        ending = Ending(new_tokens, frozenset({EOS}), deadline=self.clock + 20 if late else None)
        sequence = Sequence(prompt_of(ids), params, ending, ahead=ahead)
        self.house.scheduler.add(sequence)
        self.sequences.append((sequence, ids, new_tokens, params))

    @precondition(lambda self: any(one.status == "ended" for one, *_ in self.sequences))
    @rule(data=st.data(), said=st.integers(0, 15), more=st.lists(st.integers(4, IMAGE - 1), min_size=1, max_size=9))
    def go_on(self, data: st.DataObject, said: int, more: list[int]) -> None:
        """The next turn of a chat: what was asked, some of what was answered, and another question."""
        ended = [(one, ids) for one, ids, *_ in self.sequences if one.status == "ended"]
        turn, asked = data.draw(st.sampled_from(ended))
        if len(ids := (*asked, *turn.generated[:said], *more)) <= 50:
            self.add(ids, 5, SamplingParams(), 1e9, False)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.steps += 1
            self.house.step()
            for number, (sequence, *_) in enumerate(self.sequences):
                if sequence.stepped and sequence.computed:
                    self.first_steps.setdefault(number, self.steps)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence, *_ = data.draw(st.sampled_from(self.sequences))
        sequence.cancellation.cancel()
        self.house.scheduler.sweep(self.clock)
        assert sequence.status == "ended"

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        sequence, *_ = data.draw(st.sampled_from(self.sequences))
        self._read(sequence)

    def _read(self, sequence: Sequence) -> None:
        self.tokens = getattr(self, "tokens", {})
        while sequence.pieces:
            self.tokens.setdefault(id(sequence), []).extend(sequence.pieces.popleft().token_ids)

    @rule(error=st.booleans())
    def break_down(self, error: bool) -> None:
        parts = self.house.schedule()
        if error:
            self.house.scheduler.fail(parts, EngineError("broken"))
            assert all(part.sequence.status == "ended" for part in parts)
        else:
            self.house.scheduler.abort(parts)
            assert all(part.sequence.status == "waiting" for part in parts)

    @rule()
    def wait(self) -> None:
        self.clock += 5
        for sequence in self.house.scheduler.sweep(self.clock):
            assert isinstance(sequence.error, DeadlineExceeded)
        assert not any(s.status != "ended" and s.deadline and s.deadline <= self.clock for s, *_ in self.sequences)

    @invariant()
    def pages_are_all_there(self) -> None:
        if hasattr(self, "house"):
            self.house.check_pages([sequence for sequence, *_ in self.sequences])

    @invariant()
    def older_ones_came_first(self) -> None:
        steps = [self.first_steps[number] for number in sorted(getattr(self, "first_steps", {}))]
        assert steps == sorted(steps)

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        steps = 0
        while self.house.scheduler.running or self.house.scheduler.waiting:
            for sequence, *_ in self.sequences:
                self._read(sequence)
            steps += 1
            assert self.house.step() > 0, "nothing goes on though all readers read"
            assert steps < 3000, "some sequence starves"
        for sequence, ids, new_tokens, params in self.sequences:
            self._read(sequence)
            made = self.tokens.get(id(sequence), [])
            expected = alone(ids, new_tokens, params)
            if sequence.error is not None or sequence.cancellation.cancelled:
                assert made == expected[: len(made)]
            else:
                assert made == expected
        self.house.check_pages([sequence for sequence, *_ in self.sequences])
        pool = self.house.pool
        assert pool.available == pool.pages - 1
        assert pool.rows.available == max(pool.rows.rows - 1, 0)
        self.house.scheduler.forget()
        assert (pool.warm, pool.rows.snapshots) == (0, 0)


Traffic.TestCase.settings = settings(
    max_examples=120, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_traffic = Traffic.TestCase


def test_youngest_gives_way_where_pages_run_out_and_says_the_same_afterwards():
    house = House(pages=12, page=4)
    sequences = [sequence_of(list(range(5 + n, 13 + n)), 20, ahead=1e9) for n in range(3)]
    for sequence in sequences:
        house.scheduler.add(sequence)
    gave_way: list[int] = []
    while house.scheduler.running or house.scheduler.waiting:
        before = [sequence.status for sequence in sequences]
        house.step()
        gave_way += [
            n for n, sequence in enumerate(sequences) if (before[n], sequence.status) == ("running", "waiting")
        ]
    assert gave_way
    assert 0 not in gave_way
    for n, sequence in enumerate(sequences):
        assert tokens_of(sequence) == alone(tuple(range(5 + n, 13 + n)), 20, SamplingParams())


def test_a_known_beginning_is_not_computed_again():
    house = House(page=4)
    first = list(range(5, 5 + 22))
    house.scheduler.add(sequence_of(first, 3))
    house.drain()
    computed = len(house.engine.steps)
    again, longer, other = (
        sequence_of(first, 3),
        sequence_of([*first, 30, 31], 3),
        sequence_of([*first[:10], 30, 31], 3),
    )
    for sequence in (again, longer, other):
        house.scheduler.add(sequence)
    parts = house.schedule()
    # Wholly known: the last token alone, whose logits are wanted. Else from the first token that differs.
    assert [(part.start, part.stop) for part in parts] == [(21, 22), (22, 24), (10, 12)]
    assert all(len(part.copies) == 1 for part in parts)  # each goes on within a page that is known in part
    house.finish(parts)
    house.drain()
    assert len(house.engine.steps) == computed + 3
    for sequence, ids in ((again, first), (longer, [*first, 30, 31]), (other, [*first[:10], 30, 31])):
        assert tokens_of(sequence) == alone(tuple(ids), 3, SamplingParams())


def test_the_second_turn_of_a_chat_computes_what_is_new():
    house = House(page=4)
    turn = sequence_of(list(range(5, 20)), 6)
    house.scheduler.add(turn)
    house.drain()
    said = tokens_of(turn)
    # The last token that was said is not in the cache: nothing was computed after it.
    house.scheduler.add(sequence_of([*range(5, 20), *said, 30, 31, 32], 2))
    (part,) = house.schedule()
    assert (part.start, part.stop) == (15 + len(said) - 1, 15 + len(said) + 3)


def test_pages_shared_by_many_are_held_once():
    house = House(pages=40, page=4)
    system = list(range(5, 5 + 16))
    house.scheduler.add(sequence_of([*system, 30], 1))
    house.drain()
    for n in range(6):
        house.scheduler.add(sequence_of([*system, 31 + n], 3, ignore_eos=True))
    house.step()
    assert house.scheduler.running == 6
    assert house.pool.pages - 1 - house.pool.available == 4 + 6


def test_a_page_that_a_step_was_to_copy_is_not_known_when_the_step_fails():
    house = House(page=4)
    house.scheduler.add(sequence_of([5, 6, 7, 8, 9, 10], 1))
    house.drain()
    broken = sequence_of([5, 6, 7, 8, 9, 11], 4)
    house.scheduler.add(broken)
    parts = house.schedule()
    assert parts[0].copies
    house.scheduler.fail(parts, EngineError("broken"))
    assert isinstance(broken.error, EngineError)
    house.check_pages([broken])
    again = sequence_of([5, 6, 7, 8, 9, 11], 4)
    house.scheduler.add(again)
    house.drain()
    assert tokens_of(again) == alone((5, 6, 7, 8, 9, 11), 4, SamplingParams())


def test_a_prompt_is_read_in_small_chunks_beside_decodes_and_in_large_ones_alone():
    house = House(pages=200, page=4, chunk=100, max_tokens=200)
    first = sequence_of(list(range(5, 10)), 60, temperature=1.0, seed=1)
    long = [n % 30 + 7 for n in range(250)]
    house.scheduler.add(first)
    house.step()
    house.scheduler.add(sequence_of(long, 2))
    beside = []
    while first.status == "running":
        parts = house.schedule()
        assert parts[0].sequence is first
        beside += [part.stop - part.start for part in parts[1:]]
        house.finish(parts)
        if len(beside) == 3:
            break
    assert beside == [MIXED_TOKENS] * 3
    first.cancellation.cancel()
    house.scheduler.sweep(0)
    (part,) = house.schedule()
    assert (part.start, part.stop) == (3 * MIXED_TOKENS, 172)  # 43 pages: at most 100 tokens more, and whole pages


def test_an_engine_without_such_a_limit_reads_whole_chunks_of_several_prompts_beside_decodes():
    house = House(pages=200, page=4, chunk=100, mixed_tokens=None)
    first = sequence_of(list(range(5, 10)), 60, temperature=1.0, seed=1)
    house.scheduler.add(first)
    house.step()
    for size in (150, 31):
        house.scheduler.add(sequence_of([(n + size) % 28 + 11 for n in range(size)], 2))
    taken = []
    for _ in range(2):
        parts = house.schedule()
        taken.append([part.stop - part.start for part in parts])
        house.finish(parts)
    assert taken == [[1, 100], [1, 50, 31]]


def test_prompts_on_an_engine_whose_rows_depend_on_the_step_are_cut_and_shared_at_fixed_places():
    house = House(pages=200, page=4, chunk=10, packed=False)
    ids = [n % 30 + 5 for n in range(35)]
    house.scheduler.add(sequence_of(ids, 4))
    house.drain()
    assert [step.tokens for step in house.engine.steps[:4]] == [10, 10, 10, 5]
    house.scheduler.add(sequence_of([*ids, 5, 6], 1))
    assert [(part.start, part.stop) for part in house.schedule()] == [(30, 37)]


def test_two_sequences_take_turns_on_an_engine_of_one():
    house = House(packed=False, sequences=1, chunk=10, page=64)
    first = sequence_of([5, 6], 6, temperature=1.0, seed=1)
    house.scheduler.add(first)
    house.step()
    house.scheduler.add(sequence_of([n % 30 + 5 for n in range(25)], 6))
    turns = []
    while first.status == "running":
        (part,) = house.schedule()
        turns.append(part.sequence is first)
        house.finish((part,))
    assert turns == [True, False] * (len(turns) // 2) + [True] * (len(turns) % 2)


def test_a_reader_that_does_not_read_stops_its_own_sequence_alone():
    house = House(pages=12, page=4)
    lazy = sequence_of(list(range(5, 25)), 20, ahead=2)
    house.scheduler.add(lazy)
    for _ in range(2):
        house.step()
    assert lazy.paused
    assert house.step() == 0
    busy = sequence_of(list(range(6, 26)), 12)  # takes pages that the lazy one has
    house.scheduler.add(busy)
    while busy.status != "ended":
        assert house.step() == 1
    assert tokens_of(busy) == alone(tuple(range(6, 26)), 12, SamplingParams())
    made = []
    while lazy.status != "ended" or lazy.pieces:
        made += tokens_of(lazy)
        lazy.pieces.clear()
        house.step()
    assert made == alone(tuple(range(5, 25)), 20, SamplingParams())


def test_slow_readers_in_a_small_pool_have_little_computed_again():
    house = House(pages=16, page=4)
    params = SamplingParams(seed=1, temperature=1.0, ignore_eos=True)
    slow = [Sequence(prompt_of([5 + n, *range(6, 20)]), params, Ending(40), ahead=16) for n in range(3)]
    for sequence in slow:
        house.scheduler.add(sequence)
    made: list[list[int]] = [[] for _ in slow]
    while any(sequence.status != "ended" or sequence.pieces for sequence in slow):
        for _ in range(5):  # steps while a reader takes a piece
            house.step()
        for n, sequence in enumerate(slow):
            if sequence.pieces:
                made[n] += sequence.pieces.popleft().token_ids
    for n, tokens in enumerate(made):
        assert tokens == alone((5 + n, *range(6, 20)), 40, params)
    assert sum(step.tokens for step in house.engine.steps) < 3 * 3 * (15 + 40)


def test_readers_that_do_not_read_keep_no_state_row_from_others():
    house = House(pages=100, page=4, rows=3)
    lazy = [sequence_of([5 + n, 6], 20, ahead=1) for n in range(2)]
    for sequence in lazy:
        house.scheduler.add(sequence)
        house.step()
    assert house.step() == 0
    busy = sequence_of([8, 9], 6)
    house.scheduler.add(busy)
    while busy.status != "ended":
        assert house.step() == 1
    assert tokens_of(busy) == alone((8, 9), 6, SamplingParams())
    for n, sequence in enumerate(lazy):
        made = []
        while sequence.status != "ended" or sequence.pieces:
            made += tokens_of(sequence)
            sequence.pieces.clear()
            house.step()
        assert made == alone((5 + n, 6), 20, SamplingParams())
    house.check_pages(lazy)


def test_cancelling_frees_pages_in_the_same_step():
    house = House(pages=30, page=4)
    sequences = [sequence_of(list(range(5 + n, 25 + n)), 20) for n in range(2)]
    for sequence in sequences:
        house.scheduler.add(sequence)
    parts = house.schedule()
    sequences[0].cancellation.cancel()  # while the step runs
    house.finish(parts)
    assert sequences[0].status == "ended"
    assert house.scheduler.running == 1
    house.check_pages(sequences)


def test_what_cannot_be_taken_is_refused():
    house = House(pages=4, page=4)
    with pytest.raises(RequestError, match=r"^the request may take 13 tokens, the cache has room for 12$"):
        house.scheduler.add(sequence_of([5] * 10, 4))
    house.scheduler.add(sequence_of([5] * 10, 3))
    with pytest.raises(QueueFull, match=r"^1 requests wait already \(allowed: 1\)$"):
        house.scheduler.add(sequence_of([5], 1), waiting=1)


def test_unused_pages_go_the_longest_unused_first_and_the_deepest_of_these():
    pool = PagePool(5, 2)
    contents = [np.array([[a, 0], [a, 0], [b, 0], [b, 0]], np.int64).tobytes() for a, b in ((1, 2), (3, 4))]
    pages = []
    for content in contents:
        table = PageTable(pool)
        assert table.begin(content, lambda place: place) == Beginning()
        table.grow(4)
        pages.append(table.pages.tolist())
        table.share(content, 4)
        table.release()
    assert pool.available == pool.warm == 4
    nodes, _, tokens = pool.find(contents[0], 4)
    assert tokens == 4
    pool.use(nodes[0])
    pool.drop(nodes[0])
    assert [pool.take() for _ in range(4)] == [pages[0][1], pages[1][1], pages[1][0], pages[0][0]]
    with pytest.raises(EngineError, match="no page is available"):
        pool.take()
