"""Time as the controller has it: it stands still while the controller does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from steer.workers.clock import Clock, Timer

LIMIT_S = 2.0


BEAT_S = LIMIT_S / 4


class Time:
    """A time, and an event loop that calls what is due when it is wound."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._due: list[tuple[float, Handle, Callable[..., object], tuple[object, ...]]] = []

    def read_s(self) -> float:
        return self.now_s

    def call_later(self, delay: float, callback: Callable[..., object], *args: object) -> Handle:
        self._due.append((self.now_s + delay, handle := Handle(), callback, args))
        return handle

    def pass_s(self, seconds: float) -> None:
        """Everything on time."""
        end_s = self.now_s + seconds
        while self._due and (first := min(self._due, key=lambda due: due[0]))[0] <= end_s:
            self.now_s = max(self.now_s, first[0])
            self._call(*first)
        self.now_s = end_s

    def jump_s(self, seconds: float) -> None:
        """Nothing runs meanwhile, and what is due comes late."""
        self.now_s += seconds
        self.pass_s(0.0)

    def _call(
        self,
        at_s: float,
        handle: Handle,
        callback: Callable[..., object],
        args: tuple[object, ...],
    ) -> None:
        self._due.remove((at_s, handle, callback, args))
        if not handle.cancelled:
            callback(*args)


class Handle:
    """What a loop gives for a call to come."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def wound() -> Time:
    return Time()


@pytest.fixture
def clock(wound: Time) -> Clock:
    made = Clock(wound.read_s)
    made.measure(LIMIT_S)
    made.run(wound)  # type: ignore[arg-type]
    return made


def test_it_goes_as_time_does(wound: Time, clock: Clock) -> None:
    began_s = clock.now_s()
    wound.pass_s(100.0)
    assert clock.now_s() - began_s == pytest.approx(100.0)
    assert clock.missed_s == 0


def test_it_stands_still_in_a_gap(wound: Time, clock: Clock) -> None:
    began_s = clock.now_s()
    wound.jump_s(500.0)
    assert clock.now_s() == began_s
    assert clock.missed_s == 500.0
    assert (clock.stops, clock.stopped_s) == (1, 500.0)
    wound.pass_s(10.0)
    assert clock.now_s() - began_s == pytest.approx(10.0)


def test_it_goes_slower_where_every_look_is_late(wound: Time, clock: Clock) -> None:
    began_s = clock.now_s()
    for _ in range(101):
        wound.jump_s(3 * BEAT_S)
    assert clock.now_s() - began_s == pytest.approx(100 * BEAT_S)
    assert clock.stops == 1


@pytest.mark.parametrize("on_time", range(0, 20, 3))
def test_who_is_silent_is_found_however_often_looks_are_late(
    wound: Time, clock: Clock, on_time: int
) -> None:
    """Though everybody's time begins anew with each gap that comes alone."""
    heard_s, stops = clock.now_s(), 0
    for _ in range(50):
        wound.jump_s(3 * BEAT_S)
        if clock.stops > stops:
            heard_s, stops = clock.now_s(), clock.stops
        wound.pass_s(on_time * BEAT_S)
        if clock.now_s() - heard_s >= LIMIT_S:
            return
    raise AssertionError


def test_it_stands_still_again_after_a_while(wound: Time, clock: Clock) -> None:
    for _ in range(3):
        wound.jump_s(500.0)
        wound.pass_s(2 * LIMIT_S)
    assert clock.stops == 3
    assert clock.missed_s == 1500.0


def test_a_look_that_is_a_little_late_is_no_gap(wound: Time, clock: Clock) -> None:
    wound.jump_s(0.9)
    assert clock.missed_s == 0


@pytest.mark.parametrize("before_s", [0.0, 0.1, 15.0, 29.9])
def test_a_timer_gives_the_time_that_it_says(wound: Time, clock: Clock, before_s: float) -> None:
    """Whenever the gap is."""
    rung: list[float] = []
    clock.call_later(30.0, lambda: rung.append(wound.now_s))
    began_s = wound.now_s
    wound.pass_s(before_s)
    wound.jump_s(325.0)
    wound.pass_s(30.0 - before_s - 0.1)
    assert rung == []
    wound.pass_s(1.0)
    assert len(rung) == 1
    assert rung[0] - began_s >= 325.0 + 30.0


def test_a_timer_that_is_called_off(wound: Time, clock: Clock) -> None:
    rung: list[Timer] = []
    timer = clock.call_later(1.0, lambda: rung.append(timer))
    wound.jump_s(60.0)
    timer.cancel()
    wound.pass_s(60.0)
    assert rung == []
