"""How often those who start are looked at."""

from __future__ import annotations

from collections import Counter

import pytest

from steer.health.pace import FIRST_S, LAST_S, Pace


def looks_in(pace: Pace[int], until_s: float, each_takes_s: float = 0.0) -> Counter[int]:
    """As a loop with nothing else to do would look: only time that is due passes."""
    seen: Counter[int] = Counter()
    now_s = 0.0
    while (after_s := pace.next_in_s(now_s)) is not None and now_s + after_s <= until_s:
        now_s += after_s
        looked = list(pace.due(now_s))
        seen.update(looked)
        took_s = each_takes_s * len(looked)
        now_s += took_s
        pace.took(took_s, now_s)
    return seen


@pytest.mark.parametrize("number", [10, 1_000])
def test_looks_at_one_do_not_grow_with_the_number_of_the_others(number: int) -> None:
    pace = Pace[int]()
    for one in range(number):
        pace.add(one, 0.0)
    seen = looks_in(pace, 1.0)
    assert set(seen) == set(range(number))
    assert set(seen.values()) == {25}


@pytest.mark.parametrize("ready_s", [0.05, 0.2, 1.0])
def test_who_is_ready_is_seen_before_a_tenth_more_of_its_start(ready_s: float) -> None:
    pace = Pace[int]()
    pace.add(0, 0.0)
    now_s = 0.0
    while now_s < ready_s:
        now_s += pace.next_in_s(now_s) or 0.0
        list(pace.due(now_s))
    assert now_s <= 1.1 * ready_s + FIRST_S


def test_others_that_come_later_have_nobody_looked_at_more_often() -> None:
    pace = Pace[int]()
    pace.add(0, 0.0)
    alone = looks_in(pace, 2.0)[0]
    pace, seen = Pace[int](), Counter[int]()
    pace.add(0, 0.0)
    for at in range(1, 200):
        pace.add(at, at / 100)
        seen.update(pace.due(at / 100))
    assert seen[0] <= alone


def test_who_says_so_itself_is_seldom_looked_at() -> None:
    pace = Pace[int]()
    pace.add(0, 0.0, LAST_S)
    assert looks_in(pace, 1.0)[0] == 1.0 / LAST_S


def test_looks_take_a_fifth_of_the_time_and_no_more() -> None:
    pace = Pace[int]()
    for one in range(1_000):
        pace.add(one, 0.0)
    each_takes_s = 0.001
    assert looks_in(pace, 60.0, each_takes_s).total() * each_takes_s <= 60.0 / 5


def test_who_stops_in_the_middle_goes_on_with_the_others() -> None:
    pace = Pace[int]()
    for one in range(5):
        pace.add(one, one / 1000)
    now_s = 4 / 1000 + FIRST_S
    first = next(pace.due(now_s))
    assert [first, *pace.due(now_s)] == [0, 1, 2, 3, 4]


def test_who_is_removed_is_not_looked_at_and_may_come_again() -> None:
    pace = Pace[int]()
    pace.add(1, 0.0)
    pace.add(1, 0.0)
    pace.remove(1)
    assert pace.next_in_s(1.0) is None
    pace.add(1, 1.0)
    assert list(pace.due(1.0 + FIRST_S)) == [1]
