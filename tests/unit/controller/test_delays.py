"""How late the controller's loop is, with a clock of the test's own."""

from __future__ import annotations

import asyncio

from steer.controller.delays import BOUNDS_MS, Delays, timed_loop

MS = 0.001


def counted(*delays_ms: float) -> Delays:
    delays = Delays()
    for each in delays_ms:
        delays.add(each * MS)
    return delays


def test_nothing_yet() -> None:
    found = Delays().report()
    assert (found.count, found.max, found.p50, found.p99_9) == (0, 0, 0, 0)
    assert [bound for bound, _ in found.buckets] == list(BOUNDS_MS)


def test_each_is_in_its_bucket() -> None:
    found = counted(0.05, 0.15, 0.15, 19.9, 20.1, 9000).report()
    assert {bound: count for bound, count in found.buckets if count} == {
        0: 1,
        0.1: 2,
        10: 1,
        20: 1,
        5000: 1,
    }
    assert (found.count, found.max) == (6, 9000)


def test_shares_are_told_to_the_end_of_a_bucket() -> None:
    found = counted(*[0.3] * 980, *[3] * 15, *[30] * 4, 31).report()
    assert (found.p50, found.p99, found.p99_9, found.max) == (0.5, 5, 31, 31)


class Time:
    """A time that goes on only where somebody takes it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def read_s(self) -> float:
        return self.now_s

    def take(self, ms: float) -> None:
        self.now_s += ms * MS


def test_the_delay_of_a_turn_is_all_that_is_done_in_it() -> None:
    delays, time = Delays(), Time()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            loop.call_soon(time.take, 10)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=lambda: timed_loop(delays, time.read_s)) as runner:
        runner.run(work())
    found = delays.report()
    assert found.max == 30
    assert [count for bound, count in found.buckets if bound == 20] == [1]
