"""Who is hung, judged by histories: nothing is started."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from steer.workers.hang import Evidence, History, Look, Rest, Verdict

UNSEEN = Evidence()


def verdicts(
    *looks: Look | None,
    timeout_s: float = 2.0,
    evidence: Callable[[float], Evidence] = lambda _: UNSEEN,
    opened: Callable[[int], int | None] = lambda _: None,
) -> list[Verdict]:
    """One look a quarter of a second at the one socket of a worker.

    Args:
        evidence: what a closer look at a time shows.
        opened: connections counted at each look.
    """
    history = History(timeout_s)
    found = []
    for at, look in enumerate(looks):
        now_s = at / 4
        found.append(
            history.judge(
                now_s,
                {} if look is None else {0: look},
                opened(at),
                partial(evidence, now_s),
            )
        )
    return found


def when_over(*looks: Look, timeout_s: float = 2.0) -> float | None:
    """After how many seconds one that shows nothing else is hung, each look being four, one
    each quarter of a second; None: it is not."""
    slowly = [look for look in looks for _ in range(4)]
    found = verdicts(*slowly, timeout_s=timeout_s)
    return found.index(Verdict.HUNG) / 4 if Verdict.HUNG in found else None


def test_nothing_waits_and_nothing_is_done() -> None:
    assert when_over(*[Look(0)] * 10) is None


def test_something_waits_and_nothing_is_done() -> None:
    assert when_over(*[Look(1)] * 10) == 2
    assert when_over(Look(0), *[Look(1)] * 10) == 2.75
    assert when_over(*[Look(1)] * 10, timeout_s=5) == 5


def test_more_and_more_waits_and_nothing_is_done() -> None:
    assert when_over(*[Look(queued, taken=0) for queued in range(1, 10)]) == 2


def test_queue_gets_shorter() -> None:
    assert when_over(Look(3), Look(3), Look(2), Look(2), Look(1), Look(1), Look(0)) is None
    assert when_over(Look(3), Look(3), Look(2), Look(2), Look(2), Look(2)) == 4


def test_what_waited_before_has_no_part_in_it() -> None:
    assert when_over(Look(1), Look(1), Look(0), Look(1), Look(1), Look(1), Look(1)) == 4.75


def test_queue_stays_as_long_but_is_not_the_same() -> None:
    looks = [Look(5, taken=taken, activity=taken) for taken in range(10)]
    assert when_over(*looks) is None


def test_busy_with_something_else() -> None:
    assert when_over(*[Look(5, taken=3, activity=now) for now in range(10)]) == 2


def test_what_is_on_its_way_is_not_taken() -> None:
    """It is counted when it is sent, and waits a round trip later."""
    on_their_way = [2, 4, 1, 3, 0, 4, 2, 3, 1, 4]
    looks = [Look(9, taken=10 + more, activity=now) for now, more in enumerate(on_their_way)]
    assert when_over(*looks) == 3


def test_what_never_arrives_is_not_taken_by_one_that_does_nothing() -> None:
    assert when_over(*[Look(5, taken=1000 * now) for now in range(10)]) == 2


def test_full_queue_of_one_at_work() -> None:
    """Filled up as fast as it is emptied; what is chosen for it besides is dropped, and counts
    for as much as the clients make of it."""
    for taken in (-7, 0, 7):
        looks = [Look(9, is_full=True, taken=taken * now, activity=now) for now in range(10)]
        assert when_over(*looks) is None


def test_full_queue_of_one_that_does_nothing() -> None:
    assert when_over(*[Look(9, is_full=True, taken=7 * now) for now in range(10)]) == 2


def test_datagrams_taken_slowly() -> None:
    """Their bytes fall by a quarter of the buffer at a time."""
    assert when_over(*[Look(50_000 + 768 * now, activity=now) for now in range(10)]) is None
    assert when_over(*[Look(50_000 + 768 * now) for now in range(10)]) == 2


def rested_s(*looks: tuple[float, bool]) -> float:
    """After looks four times a second, each with the CPU time since the last, and whether it was
    asleep."""
    rest, cpu_s, found_s = Rest(), 0.0, 0.0
    for at, (more_s, is_asleep) in enumerate(looks):
        cpu_s += more_s
        found_s = rest.lasted_s(at / 4, cpu_s, is_asleep)
    return found_s


def test_one_that_only_looks_at_a_clock_rests() -> None:
    assert rested_s(*[(0.0, True)] * 9) == 2
    assert rested_s(*[(0.01, True)] * 9) == 2


def test_one_that_computes_or_waits_for_a_disk_does_not() -> None:
    assert rested_s(*[(0.05, True)] * 9) == 0
    assert rested_s(*[(0.0, False)] * 9) == 0
    assert rested_s(*[(0.2, False)] * 5, *[(0.0, True)] * 4) == 1


STALLED = [Look(3, taken=0)] * 40


IDLE = {1: (0, 100), 2: (0, 100)}


GETS_ON: dict[str, Callable[[float], Evidence]] = {
    "computes": lambda now_s: Evidence(now_s / 2, None, IDLE, False),
    "moves bytes": lambda now_s: Evidence(0.0, None, {1: (0, int(now_s * 8))}, False),
    "closes": lambda now_s: Evidence(0.0, None, {int(now_s * 8): (0, 0), 1: (0, 0)}, False),
    "closes, as is counted": lambda now_s: Evidence(0.0, 90 - int(now_s * 8), None, False),
    "is in its event loop": lambda _: Evidence(0.0, 2, IDLE, True),
    "is in its event loop but for a moment": lambda now_s: Evidence(
        0.0, 2, IDLE, now_s % 3.25 != 2
    ),
}


DOES_NOT: dict[str, Callable[[float], Evidence]] = {
    "nothing is seen": lambda _: UNSEEN,
    "does nothing": lambda _: Evidence(0.0, 2, IDLE, False),
    "looks at its clock": lambda now_s: Evidence(now_s / 50, 2, IDLE, False),
    "gets more": lambda now_s: Evidence(0.0, int(now_s * 8), None, None),
    "holds nothing": lambda now_s: Evidence(now_s, 0, {}, True),
    "holds nothing, as is counted": lambda now_s: Evidence(now_s, 0, None, True),
}


@pytest.mark.parametrize("evidence", GETS_ON.values(), ids=GETS_ON.keys())
def test_one_that_gets_on_is_at_capacity(evidence: Callable[[float], Evidence]) -> None:
    found = verdicts(*STALLED, evidence=evidence)
    assert set(found[:8]) == {Verdict.FINE}
    assert set(found[8:]) == {Verdict.AT_CAPACITY}


def test_one_that_closes_its_last_connection_makes_progress() -> None:
    def evidence(now_s: float) -> Evidence:
        return Evidence(0.0, None, {1: (0, 0)} if now_s < 2 else {}, False)

    assert verdicts(*STALLED, evidence=evidence)[8] is Verdict.AT_CAPACITY


@pytest.mark.parametrize("evidence", DOES_NOT.values(), ids=DOES_NOT.keys())
def test_one_that_does_not_is_hung(evidence: Callable[[float], Evidence]) -> None:
    found = verdicts(*STALLED, evidence=evidence)
    assert found.index(Verdict.HUNG) == 8


def test_one_at_capacity_that_takes_is_fine_again() -> None:
    found = verdicts(*STALLED, Look(2, taken=1, activity=1), evidence=GETS_ON["computes"])
    assert found[-2:] == [Verdict.AT_CAPACITY, Verdict.FINE]


def test_one_at_capacity_that_gets_on_no_more_is_hung() -> None:
    """Also when it is not chosen, and has no queue."""
    history = History(2.0)
    stops_s = 4.0

    def evidence(now_s: float) -> Evidence:
        return Evidence(min(now_s, stops_s), None, IDLE, False)

    for at in range(9):
        now_s = at / 4
        found = history.judge(now_s, {0: Look(3)}, None, partial(evidence, now_s))
    assert found is Verdict.AT_CAPACITY
    later = {
        at / 4: history.judge_at_capacity(at / 4, partial(evidence, at / 4)) for at in range(9, 40)
    }
    hung_s = min(now_s for now_s, verdict in later.items() if verdict is Verdict.HUNG)
    assert stops_s < hung_s <= stops_s + 2 * 2.0


def grows(at: int) -> int:
    """One more connection each second."""
    return at // 4


def starved(awaits: bool | None, cpu: float = 0.0) -> Callable[[float], Evidence]:
    """Requests wait on connections that it has."""
    return lambda now_s: Evidence(
        cpu * now_s, None, dict.fromkeys(range(1 + int(now_s)), (50, 0)), awaits
    )


NOTHING_QUEUED = [Look(0)] * 40


def test_one_that_takes_all_and_serves_none_is_hung() -> None:
    found = verdicts(*NOTHING_QUEUED, opened=grows, evidence=starved(awaits=False))
    assert Verdict.HUNG in found[8:14]


def test_one_that_computes_meanwhile_is_at_capacity() -> None:
    found = verdicts(*NOTHING_QUEUED, opened=grows, evidence=starved(awaits=False, cpu=1.0))
    assert Verdict.AT_CAPACITY in found[8:14]
    assert Verdict.HUNG not in found


NOT_STARVED = {
    "it is in its event loop": starved(awaits=True),
    "it cannot be looked at": starved(awaits=None),
    "connections are not seen": lambda _: Evidence(0.0, 5, None, False),
    "they have asked for nothing": lambda _: Evidence(0.0, 5, IDLE, False),
    "it reads": lambda now_s: Evidence(0.0, 5, {1: (50, int(8 * now_s))}, False),
}


@pytest.mark.parametrize("evidence", NOT_STARVED.values(), ids=NOT_STARVED.keys())
def test_one_that_may_be_fine_is_left_alone(evidence: Callable[[float], Evidence]) -> None:
    assert set(verdicts(*NOTHING_QUEUED, opened=grows, evidence=evidence)) == {Verdict.FINE}


def test_nobody_looks_closer_where_connections_come_and_go() -> None:
    """Nor where they are as they were, once that is known."""
    looked: list[float] = []

    def look(now_s: float) -> Evidence:
        looked.append(now_s)
        return Evidence(0.0, 5, IDLE, True)

    for opened in (lambda at: at % 4, lambda _: None):
        verdicts(*NOTHING_QUEUED, opened=opened, evidence=look)
    assert looked == []
    verdicts(*NOTHING_QUEUED, opened=lambda _: 7, evidence=look)
    assert looked == [1.0, 2.0]
