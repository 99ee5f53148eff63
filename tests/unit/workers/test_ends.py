"""Ends of workers, with fake processes: what is looked for, how often, and who is told."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

import pytest

from steer.linux import family, retry, services
from steer.linux.family import Family
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.workers import ends
from steer.workers.ends import MOST, End, Ends, look_again_s
from testkit.fake_process import DEADLINE_S, FIRST, FakeProcess

sizes = pytest.mark.parametrize("workers", [10, 1000])


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed, or was looked at, waits only a moment."""
    monkeypatch.setattr(retry, "AGAIN_S", 0.01)
    monkeypatch.setattr(ends, "_LOOK_AGAIN_S", 0.005)


class FakeHandle:
    slot = 0


class Scene:
    """Workers, and what is seen of their ends.

    Attributes:
        others: by worker, what `family.others` finds.
        looks: how many workers were looked for at each look.
        refused: looks that still fail.
    """

    def __init__(self, count: int, told: bool = True) -> None:
        self.workers = [FakeProcess(FIRST + number, told) for number in range(count)]
        self.others: dict[int, list[int]] = {}
        self.looks: list[int] = []
        self.refused = 0
        self.lost: list[int] = []
        self.ended: list[int] = []
        loop, log = asyncio.get_running_loop(), Log("error", "text")
        self.errors: list[str] = []
        log.error = lambda words, *values: self.errors.append(words % values)  # type: ignore[method-assign]
        retry = Retry(log, Spare(0))
        retry.watch(loop)
        self.ends = Ends(
            loop,
            retry,
            lambda _: None,
            lambda ends: self.lost.extend(_pids(ends)),
            lambda ends: self.ended.extend(_pids(ends)),
            self._find,
        )
        for worker in self.workers:
            self.ends.watch(cast(Any, FakeHandle()), cast(Any, worker))

    def _find(self, families: Sequence[Family], beside: Collection[int]) -> list[list[int]]:
        assert {each.pid for each in families} <= set(beside)
        self.looks.append(len(families))
        if self.refused:
            self.refused -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return [list(self.others.get(each.pid, [])) for each in families]

    def end_all(self) -> None:
        for worker in self.workers:
            worker.first_ends()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():
                await asyncio.sleep(0)

    async def until_over(self) -> None:
        await self.until(lambda: len(self.ended) == len(self.workers))


def _pids(ends: Iterable[End]) -> list[int]:
    return [each.process.pid for each in ends]


@sizes
@pytest.mark.parametrize("told", [True, False], ids=["told", "crashed"])
def test_all_that_end_at_once_take_few_looks(workers: int, told: bool) -> None:
    async def scene() -> None:
        seen = Scene(workers, told)
        seen.end_all()
        await seen.until_over()
        assert sorted(seen.ended) == [each.pid for each in seen.workers]
        assert len(seen.looks) == -(-workers // MOST)
        assert not seen.lost

    asyncio.run(scene())


@sizes
def test_one_of_many_takes_one_look(workers: int) -> None:
    async def scene() -> None:
        seen = Scene(workers)
        seen.workers[3].first_ends()
        await seen.until(lambda: bool(seen.ended))
        assert (seen.ended, seen.looks) == ([FIRST + 3], [1])

    asyncio.run(scene())


@sizes
def test_what_goes_on_is_not_looked_at_again_and_again(workers: int) -> None:
    """The kernel tells when one of them has ended."""

    async def scene() -> None:
        seen = Scene(workers)
        left = {each.pid: [each.pid + workers, each.pid + 2 * workers] for each in seen.workers}
        seen.others = dict(left)
        seen.end_all()
        await seen.until(lambda: len(seen.lost) == workers)
        assert not seen.ended
        assert [each.asked_to_end for each in seen.workers] == list(left.values())
        before = sum(seen.looks)
        assert before == 2 * workers, "at once, and a moment later"
        seen.others.clear()
        seen.ends.reaped(pid for pids in left.values() for pid in pids)
        await seen.until_over()
        assert sum(seen.looks) == 3 * workers
        assert len(seen.lost) == workers, "once of each"

    asyncio.run(scene())


def test_one_whose_others_end_one_after_the_other_ends_once() -> None:
    async def scene() -> None:
        seen = Scene(1)
        seen.others = {FIRST: [FIRST + 1, FIRST + 2]}
        seen.end_all()
        await seen.until(lambda: bool(seen.lost))
        may_look_s = asyncio.get_running_loop().time() + look_again_s(0.0)
        await seen.until(lambda: asyncio.get_running_loop().time() > may_look_s)
        seen.others.clear()
        seen.ends.reaped([FIRST + 1])
        seen.ends.reaped([FIRST + 2])
        await seen.until_over()
        for _ in range(10):
            await asyncio.sleep(0)
        assert seen.ended == [FIRST]
        assert not seen.errors

    asyncio.run(scene())


def test_what_is_no_child_of_ours_is_looked_at_all_the_same() -> None:
    async def scene() -> None:
        seen = Scene(1)
        seen.workers[0].family.is_child = False
        seen.others = {FIRST: [FIRST + 1]}
        seen.end_all()
        await seen.until(lambda: len(seen.looks) == 3)
        seen.others.clear()
        await seen.until_over()

    asyncio.run(scene())


def test_nobody_waits_for_what_one_that_crashed_left_behind() -> None:
    async def scene() -> None:
        seen = Scene(1, told=False)
        seen.others = {FIRST: [FIRST + 1]}
        seen.end_all()
        await seen.until_over()
        (worker,) = seen.workers
        assert worker.left_behind == worker.asked_to_end == [FIRST + 1]

    asyncio.run(scene())


@sizes
def test_all_that_are_killed_at_once_take_few_looks(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    killed: list[int] = []

    def send(number: int, pids: Iterable[int]) -> None:
        assert number == signal.SIGKILL
        killed.extend(pids)

    async def scene() -> None:
        seen = Scene(workers)
        seen.others = {each.pid: [each.pid + workers] for each in seen.workers}
        for each in seen.workers:
            seen.ends.kill(cast(Any, each))
        assert all(each.is_killed for each in seen.workers)
        await seen.until(lambda: len(killed) == workers)
        assert len(seen.looks) == -(-workers // MOST)

    monkeypatch.setattr(family, "send", send)
    asyncio.run(scene())


def test_others_are_killed_before_the_first_is_found_to_have_ended() -> None:
    """Else they would be asked to finish, and waited for."""

    async def scene() -> None:
        seen = Scene(2)
        seen.workers[0].first_ends()
        seen.ends.kill(cast(Any, seen.workers[1]))
        seen.workers[1].first_ends()
        await seen.until_over()
        assert seen.looks == [1, 2]

    asyncio.run(scene())


def test_what_cannot_be_looked_for_is_looked_for_again() -> None:
    """Meanwhile nobody is to be chosen who may have its sockets open."""

    async def scene() -> None:
        seen = Scene(2)
        seen.refused = 1
        seen.end_all()
        await seen.until_over()
        assert seen.lost == [FIRST, FIRST + 1]
        assert seen.looks == [2, 2]

    asyncio.run(scene())


def test_once_killed_nobody_waits_for_what_cannot_be_looked_for() -> None:
    async def scene() -> None:
        seen = Scene(2)
        seen.workers[1].is_killed = True
        seen.refused = 1
        seen.end_all()
        await seen.until(lambda: bool(seen.ended))
        assert (seen.ended, seen.lost) == ([FIRST + 1], [FIRST])
        await seen.until_over()

    asyncio.run(scene())


def test_what_is_left_of_a_large_worker_is_looked_for_more_rarely() -> None:
    assert look_again_s(0.0001) == ends._LOOK_AGAIN_S
    assert look_again_s(0.1) == pytest.approx(2.0)


@sizes
def test_who_there_is_is_listed_once_for_all(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """And each is asked once whose it is."""
    listed: list[int] = []
    asked: list[int] = []

    def orphans() -> list[int]:
        listed.append(1)
        return [os.getpid()]

    def environment(pid: int) -> dict[str, str]:
        asked.append(pid)
        return {services.MARK: str(FIRST + 7)}

    monkeypatch.setattr(family, "orphans", orphans)
    monkeypatch.setattr(family.processes, "environment", environment)
    found = family.others([Family(FIRST + number) for number in range(workers)])
    assert (listed, asked) == ([1], [os.getpid()])
    assert os.getpid() in found[7]
    assert not any(found[:7] + found[8:])
