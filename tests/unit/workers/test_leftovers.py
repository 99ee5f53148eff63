"""What outlives workers, with fake processes and a clock of the test's own."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest

from steer.workers import leftovers
from steer.workers.leftovers import WITHIN_S, Leftovers

sizes = pytest.mark.parametrize("count", [10, 1000])


class FakeLoop:
    """Calls what is due when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.due: list[tuple[float, Callable[..., object], tuple[object, ...]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, after_s: float, call: Callable[..., object], *args: object) -> None:
        self.due.append((self.now_s + after_s, call, args))

    def run(self, for_s: float) -> None:
        end_s = self.now_s + for_s
        while self.due and min(self.due)[0] <= end_s:
            self.due.sort(key=lambda each: each[0])
            self.now_s, call, args = self.due.pop(0)
            call(*args)
        self.now_s = end_s


class Processes:
    """That end when they are killed, unless they wait in the kernel.

    Attributes:
        reads: how often it was read whether each is there.
        killed: when each was.
    """

    def __init__(self, loop: FakeLoop) -> None:
        self.there: set[int] = set()
        self.waiting: set[int] = set()
        self.reads = Counter[int]()
        self.killed: dict[int, float] = {}
        self._loop = loop

    def start_time_ticks(self, pid: int) -> int | None:
        return 7 if pid in self.there else None

    def is_still(self, pid: int, _began_ticks: int) -> bool:
        self.reads[pid] += 1
        return pid in self.there

    def send(self, number: int, pids: Iterable[int]) -> None:
        assert number == signal.SIGKILL
        for pid in pids:
            self.killed.setdefault(pid, self._loop.now_s)
            if pid not in self.waiting:
                self.there.discard(pid)


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, loop: FakeLoop) -> Processes:
    made = Processes(loop)
    monkeypatch.setattr(leftovers.processes, "start_time_ticks", made.start_time_ticks)
    monkeypatch.setattr(leftovers.processes, "is_still", made.is_still)
    monkeypatch.setattr(leftovers.family, "send", made.send)
    return made


@sizes
def test_those_of_many_workers_are_looked_at_together(
    loop: FakeLoop, processes: Processes, count: int
) -> None:
    """Once in a while, and each once."""
    ended: list[float] = []
    left = Leftovers(lambda: ended.append(loop.now_s))
    for pid in range(count):
        processes.there.add(pid)
        left.take(cast(Any, loop), [pid])
    assert len(loop.due) == 1
    loop.run(0.06)
    assert set(processes.reads.values()) == {1}
    processes.there.clear()
    loop.run(10.0)
    assert not processes.killed
    assert len(ended) == 1
    assert not left


def test_each_has_its_time(loop: FakeLoop, processes: Processes) -> None:
    left = Leftovers(lambda: None)
    for pid in (1, 2):
        processes.there.add(pid)
        left.take(cast(Any, loop), [pid])
        loop.run(1.0)
    loop.run(10.0)
    assert processes.killed[1] == pytest.approx(100.0 + WITHIN_S, abs=0.3)
    assert processes.killed[2] == pytest.approx(101.0 + WITHIN_S, abs=0.3)
    assert not left


def test_nobody_waits_for_ever_for_one_that_waits_in_the_kernel(
    loop: FakeLoop, processes: Processes
) -> None:
    ended: list[float] = []
    left = Leftovers(lambda: ended.append(loop.now_s))
    processes.there.add(1)
    processes.waiting.add(1)
    left.take(cast(Any, loop), [1])
    loop.run(60.0)
    assert ended == [pytest.approx(100.0 + 2 * WITHIN_S, abs=0.3)]
