"""Which prompts go on from snapshots of recurrent states, and which snapshots stay."""

from __future__ import annotations

import pytest

from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.request.sampling import SamplingParams
from tests.support.house import House, parts_of, sequence_of, tokens_of
from tests.support.paged_engine import alone


@pytest.mark.parametrize("rows", [2, 3, 9])
def test_the_second_turn_of_a_chat_goes_on_from_recurrent_states_at_its_end(rows: int) -> None:
    house = House(page=4, rows=rows)
    asked = list(range(5, 24))
    turn = sequence_of(asked, 6)
    assert parts_of(house, turn) == [(0, 19)]
    said = tokens_of(turn)
    again = sequence_of([*asked, *said, 30, 31, 32], 2)
    assert parts_of(house, again) == [(19 + len(said) - 1, 19 + len(said) + 3)]
    assert tokens_of(again) == alone((*asked, *said, 30, 31, 32), 2, SamplingParams())


def test_a_turn_after_an_answer_that_was_left_out_goes_on_from_the_last_page_of_the_prompt():
    house = House(page=4, rows=9)
    asked = [n % 30 + 5 for n in range(31)]
    assert parts_of(house, sequence_of(asked, 6)) == [(0, 20), (20, 31)]  # 31 less the tail is 23: five pages
    other = sequence_of([*asked[:27], 8, 8, 8], 2)
    assert parts_of(house, other) == [(20, 30)]
    assert tokens_of(other) == alone((*asked[:27], 8, 8, 8), 2, SamplingParams())


def test_the_third_request_goes_on_where_two_others_parted():
    house = House(page=4, rows=9)
    system = [n % 30 + 5 for n in range(22)]
    requests = [[*system, *[7 + n] * 30] for n in range(3)]
    spans = [parts_of(house, sequence_of(request, 2)) for request in requests]
    assert spans == [[(0, 44), (44, 52)], [(0, 20), (20, 44), (44, 52)], [(20, 44), (44, 52)]]


def test_prompts_on_an_engine_that_is_not_packed_go_on_where_they_were_cut():
    for page in (4, 1000):  # a sequence has pages, or lies in one
        house = House(pages=200, page=page, chunk=10, packed=False, rows=9)
        ids = [n % 30 + 5 for n in range(35)]
        assert parts_of(house, sequence_of(ids, 4)) == [(0, 10), (10, 20), (20, 30), (30, 35)]
        assert parts_of(house, sequence_of([*ids, 5, 6], 1)) == [(20, 30), (30, 37)]  # 35 less the tail is 27
        assert parts_of(house, sequence_of([*ids, 5, 7], 1)) == [(30, 37)]


@pytest.mark.parametrize(("wanted", "known"), [(0, 6), (1, 0), (2, 6)])
def test_a_sequence_takes_the_row_of_the_longest_unused_snapshot(wanted: int, known: int) -> None:
    house = House(page=4, rows=4)
    prompts = [[5 + n] * 6 for n in range(3)]
    for prompt in (*prompts, [*prompts[0], 6, 7]):  # the last uses what the first left, and takes the second one's
        parts_of(house, sequence_of(prompt, 1))
    assert house.pool.rows.snapshots == 3
    assert parts_of(house, sequence_of([*prompts[wanted], 30], 1)) == [(known, 7)]


def test_running_sequences_take_all_rows_but_what_one_goes_on_from():
    house = House(page=4, rows=4)
    for n in range(3):
        parts_of(house, sequence_of([5 + n] * 6, 1))
    sequences = [sequence_of([5] * 7, 9, ignore_eos=True), *(sequence_of([30 + n, 9], 9) for n in range(2))]
    for sequence in sequences:
        house.scheduler.add(sequence)
    house.step()
    assert (house.scheduler.running, house.pool.rows.snapshots) == (2, 1)
    house.step()
    assert (house.scheduler.running, house.pool.rows.snapshots) == (3, 0)
    house.drain()
    house.check_pages(sequences)


def test_snapshots_go_with_their_pages():
    house = House(pages=8, page=4, rows=9)
    parts_of(house, sequence_of([5] * 10, 1))
    assert house.pool.rows.snapshots == 1
    parts_of(house, sequence_of([6] * 26, 2))  # takes all pages
    assert parts_of(house, sequence_of([5] * 10, 1)) == [(0, 10)]


def test_a_step_that_fails_leaves_snapshots_as_they_are():
    house = House(page=4, rows=3)
    parts_of(house, sequence_of([5, 6, 7, 8, 9], 1))
    for end in (house.scheduler.abort, lambda parts: house.scheduler.fail(parts, EngineError("broken"))):
        house.scheduler.add(later := sequence_of([5, 6, 7, 8, 9, 10], 2))
        parts = house.schedule()
        assert [(part.row_copies, part.cleared) for part in parts] == [(((1, 2),), ())]
        end(parts)
        house.check_pages([later])
    house.drain()
    assert parts_of(house, last := sequence_of([5, 6, 7, 8, 9, 10, 11], 3))[0][0] >= 5
    assert tokens_of(last) == alone((5, 6, 7, 8, 9, 10, 11), 3, SamplingParams())
