"""A worker's life: every state × every event, and how long it backs off."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from steer.workers.lifecycle import TRANSITIONS, Command, Event, State, backoff_s, step

S, E, C = State, Event, Command

EXPECTED: dict[tuple[State, Event], tuple[State, list[Command]]] = {
    (S.STARTING, E.READY): (S.READY, [C.ACTIVATE]),
    (S.STARTING, E.LATE): (S.STARTING, [C.KILL]),
    (S.STARTING, E.EXITED): (S.BACKOFF, [C.REPLACE, C.BACK_OFF]),
    (S.STARTING, E.RETIRE): (S.STOPPING, [C.TERMINATE]),
    (S.STARTING, E.STOP): (S.STOPPING, [C.TERMINATE]),
    (S.READY, E.EXITED): (S.BACKOFF, [C.DEACTIVATE, C.REPLACE, C.BACK_OFF]),
    (S.READY, E.DRAIN): (S.DRAINING, [C.DEACTIVATE]),
    (S.READY, E.LEAVES): (S.DRAINING, [C.DEACTIVATE, C.REPLACE]),
    (S.READY, E.STUCK): (S.HUNG, [C.DEACTIVATE, C.REPLACE, C.MIGRATE_QUEUE]),
    (S.READY, E.RETIRE): (S.STOPPING, [C.DEACTIVATE, C.DRAIN]),
    (S.READY, E.STOP): (S.STOPPING, [C.DEACTIVATE, C.TERMINATE]),
    (S.DRAINING, E.UNDRAIN): (S.READY, [C.ACTIVATE]),
    (S.DRAINING, E.EXITED): (S.BACKOFF, [C.REPLACE, C.BACK_OFF]),
    (S.DRAINING, E.RETIRE): (S.STOPPING, [C.DRAIN]),
    (S.DRAINING, E.STOP): (S.STOPPING, [C.TERMINATE]),
    (S.HUNG, E.BACK): (S.READY, [C.ACTIVATE]),
    (S.HUNG, E.DRAIN): (S.DRAINING, []),
    (S.HUNG, E.LEAVES): (S.DRAINING, []),
    (S.HUNG, E.EXITED): (S.BACKOFF, [C.REPLACE, C.BACK_OFF]),
    (S.HUNG, E.RETIRE): (S.STOPPING, [C.DRAIN]),
    (S.HUNG, E.STOP): (S.STOPPING, [C.TERMINATE]),
    (S.STOPPING, E.DRAINED): (S.STOPPING, [C.TERMINATE]),
    (S.STOPPING, E.STOP): (S.STOPPING, [C.TERMINATE]),
    (S.STOPPING, E.OVERDUE): (S.STOPPING, [C.KILL]),
    (S.STOPPING, E.EXITED): (S.GONE, [C.FORGET]),
    (S.BACKOFF, E.RETRY): (S.STARTING, [C.SPAWN]),
    (S.BACKOFF, E.RETIRE): (S.GONE, [C.FORGET]),
    (S.BACKOFF, E.STOP): (S.GONE, [C.FORGET]),
}
ALL = list(product(State, Event))


@pytest.mark.parametrize("state, event", ALL)
def test_step(state: State, event: Event) -> None:
    following, commands = EXPECTED.get((state, event), (state, []))
    assert step(state, event) == (following, tuple(commands))


def test_the_table_has_every_state_and_no_more_than_is_told_here() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {(state, event) for state in State for event in TRANSITIONS[state]} == set(EXPECTED)


def walk(*events: Event) -> list[Command]:
    state = S.STARTING
    done: list[Command] = []
    for event in events:
        state, commands = step(state, event)
        done += commands
    return done


@pytest.mark.parametrize(
    "events, commands",
    [
        ([E.READY, E.STOP, E.EXITED], [C.ACTIVATE, C.DEACTIVATE, C.TERMINATE, C.FORGET]),
        (
            [E.READY, E.RETIRE, E.DRAINED, E.EXITED],
            [C.ACTIVATE, C.DEACTIVATE, C.DRAIN, C.TERMINATE, C.FORGET],
        ),
        (
            [E.LATE, E.EXITED, E.RETRY, E.READY],
            [C.KILL, C.REPLACE, C.BACK_OFF, C.SPAWN, C.ACTIVATE],
        ),
        ([E.STOP, E.READY, E.OVERDUE, E.EXITED], [C.TERMINATE, C.KILL, C.FORGET]),
        ([E.EXITED, E.STOP, E.RETRY], [C.REPLACE, C.BACK_OFF, C.FORGET]),
        ([E.READY, E.LATE, E.READY, E.OVERDUE, E.RETRY], [C.ACTIVATE]),
        (
            [E.READY, E.STUCK, E.BACK],
            [C.ACTIVATE, C.DEACTIVATE, C.REPLACE, C.MIGRATE_QUEUE, C.ACTIVATE],
        ),
        ([E.READY, E.DRAIN, E.STUCK, E.UNDRAIN], [C.ACTIVATE, C.DEACTIVATE, C.ACTIVATE]),
    ],
)
def test_lives(events: list[Event], commands: list[Command]) -> None:
    assert walk(*events) == commands


def test_in_the_table_when_ready_and_only_then() -> None:
    for state, event in ALL:
        following, commands = step(state, event)
        assert (C.ACTIVATE in commands) == (following is S.READY and state is not S.READY)
        assert (C.DEACTIVATE in commands) == (state is S.READY and following is not S.READY)


def test_out_of_the_table_comes_before_the_signal() -> None:
    for event, then in ((E.STOP, C.TERMINATE), (E.RETIRE, C.DRAIN), (E.STUCK, C.MIGRATE_QUEUE)):
        commands = step(S.READY, event)[1]
        assert commands.index(C.DEACTIVATE) < commands.index(then)


def test_every_life_can_end_and_nothing_follows() -> None:
    for state in State:
        walked, _ = step(step(state, E.STOP)[0], E.EXITED)
        assert walked is S.GONE
    assert all(step(S.GONE, event) == (S.GONE, ()) for event in Event)


@pytest.mark.parametrize(
    "failures, wait_s",
    [
        (0, 0),
        (1, 0),
        (2, 0.25),
        (3, 0.5),
        (4, 1),
        (5, 2),
        (8, 16),
        (9, 30),
        (10, 30),
        (100_000, 30),
    ],
)
def test_backoff(failures: int, wait_s: float) -> None:
    assert backoff_s(failures, served=False) == wait_s
    assert backoff_s(failures, served=True) == min(wait_s, 1)


def test_backoff_grows() -> None:
    waits = [backoff_s(failures, served=False) for failures in range(50)]
    assert all(earlier <= later for earlier, later in pairwise(waits))
