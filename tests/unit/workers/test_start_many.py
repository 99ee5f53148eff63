"""A service of many workers starts: a few in each turn of the loop. With fakes, so that what is
counted is what the pool does."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from steer.backends.base import Counts
from steer.config.plan import Generation
from steer.config.planning import plan
from steer.config.service import Service
from steer.controller import status
from steer.errors import KernelError, SteerError
from steer.linux import signals
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.loader import find
from steer.policy.cpus import Topology
from steer.workers import pool as pools
from steer.workers import process
from steer.workers.handle import WorkerHandle
from steer.workers.intake import MOST_TOGETHER, Batch
from steer.workers.lifecycle import Event, State
from steer.workers.pool import WorkerPool
from testkit.growth_fakes import FEW, MANY, Cost, rest

_CPUS = tuple(sorted(os.sched_getaffinity(0)))
_TIMEOUT_S = 60.0


class FakeBackend:
    """Counts what it is asked for."""

    name = "ebpf"
    backup = None
    forget_flows = None
    needs_order = False

    def __init__(self) -> None:
        self.anchors: dict[int, object] = {}
        self.asked: Counter[str] = Counter()
        self.there: set[int] = set()

    def add_member(self, slot: int, _fds: Sequence[int]) -> None:
        self.there.add(slot)

    def remove_member(self, slot: int) -> None:
        self.there.discard(slot)

    def stored(self) -> tuple[object, Sequence[int]]:
        self.asked["saved"] += 1
        return None, ()

    def grace_period(self) -> None:
        """No program runs."""

    def steer(self, _members: Sequence[object]) -> None:
        self.asked["publications"] += 1

    def held(self, _slot: int) -> Sequence[int]:
        return ()

    def take_counts(self, _slot: int) -> Counts:
        return Counts()

    def release(self) -> None:
        pass


class FakeGuard:
    pid = 0

    def put(self, *_: object) -> None:
        pass

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def drop(self, _key: str) -> None:
        pass

    def give_up(self) -> None:
        pass


class FakeProcess:
    """Never ends by itself.

    Args:
        fails_at: so many can be forked, and no more.
    """

    turn = 0
    forked: ClassVar[list[int]] = []
    fails_at: int | None = None

    def __init__(self, launch: Any, *_: object) -> None:
        if len(self.forked) == self.fails_at:
            raise KernelError("start a worker", "no more processes")
        self.forked.append(self.turn)
        self.pid = 1_000 + len(self.forked)
        self.launch, self.problem, self.bound = launch, None, ()
        self.running = None

    def keep(self, *_: object) -> None:
        pass

    def go_on(self) -> None:
        pass

    def watch(self, *_: object) -> None:
        pass

    def end(self) -> None:
        pass


class FakeHandle(WorkerHandle, eq=False):
    """Nothing is looked at."""

    def got_ready(self, now_s: float) -> None:
        pass


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The turn of the loop in which each worker was forked."""

    @contextmanager
    def bound(_launch: object) -> Iterator[Sequence[object]]:
        yield ()

    monkeypatch.setattr(FakeProcess, "forked", [])
    monkeypatch.setattr(FakeProcess, "fails_at", None)
    monkeypatch.setattr(FakeProcess, "turn", 0)
    monkeypatch.setattr(process, "bound", bound)
    monkeypatch.setattr(process, "fork_all", lambda launches, *_: list(map(FakeProcess, launches)))
    monkeypatch.setattr(pools, "WorkerHandle", FakeHandle)
    monkeypatch.setattr(signals, "pause", lambda _seconds: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    monkeypatch.setattr(Batch, "took", lambda *_: None)  # how long is no matter here
    return FakeProcess.forked


def pool_of(
    number: int, backend: FakeBackend, on: tuple[int, ...] = _CPUS, **keys: Any
) -> WorkerPool:
    cpus = Topology(on, on, dict.fromkeys(on, 0))
    decided = plan(Service(workers=number, **keys), cpus, {}, find.find("hash"))
    log = Log("error", "text")

    def launch(worker: WorkerHandle) -> Any:
        return SimpleNamespace(service=decided.service, binds=(), slot=worker.slot)

    return WorkerPool(
        Generation(1, decided),
        2 * number,
        cast(Any, backend),
        cast(Any, FakeGuard()),
        launch,
        log,
        Retry(log, Spare(0)),
        cast(Any, None),
    )


async def watched(pool: WorkerPool) -> None:
    """Until every worker has been started, or it is known that one cannot be."""

    pool.watch(asyncio.get_running_loop(), lambda _worker: None)
    pool.fill()
    async with asyncio.timeout(_TIMEOUT_S):
        while any(not worker.starts for worker in pool.workers) and not pool.startup.refused.done():
            FakeProcess.turn += 1
            await asyncio.sleep(0)


@pytest.mark.parametrize("number", [10, 1_000])
def test_so_many_start_before_there_is_a_loop_and_in_each_turn(
    forked: list[int], number: int
) -> None:
    """However many there are, so that who is ready is heard, and serves, after so many forks."""

    async def run() -> None:
        pool = pool_of(number, backend := FakeBackend())
        pool.start(lambda: None)
        assert forked == [0] * MOST_TOGETHER
        await watched(pool)
        assert len(forked) == len(backend.there) == number
        assert max(Counter(forked).values()) <= 2 * MOST_TOGETHER  # the first turn has two
        assert backend.asked["saved"] <= number / MOST_TOGETHER + 1

    asyncio.run(run())


@pytest.mark.parametrize(("cpus", "first"), [(1, 8), (12, 12), (256, 16)])
def test_first_are_as_many_as_there_are_cpus_within_bounds(
    monkeypatch: pytest.MonkeyPatch, forked: list[int], cpus: int, first: int
) -> None:
    pool = pool_of(300, FakeBackend())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cpus)))
    pool.start(lambda: None)
    assert len(forked) == first


def test_first_that_is_ready_serves_while_others_are_to_be_started(forked: list[int]) -> None:
    async def run() -> None:
        pool = pool_of(100, FakeBackend())
        pool.start(lambda: None)
        pool.watch(asyncio.get_running_loop(), lambda _worker: None)
        pool.report(next(iter(pool.workers)), Event.READY)
        await pool.startup.up
        pool.selection.publisher.if_due()
        assert pool.backend.asked["publications"] == 1  # type: ignore[attr-defined]
        assert len(forked) == MOST_TOGETHER
        # those that wait for their turn have not failed, and are not asked to hurry
        waiting = list(pool.workers)[MOST_TOGETHER:]
        assert {worker.state for worker in waiting} == {State.BACKOFF}
        assert {status.displayed_state(worker) for worker in waiting} == {"starting"}
        assert not any(worker.timer for worker in waiting)

    asyncio.run(run())


def test_whose_turn_it_is_costs_the_same_however_many_commands_wait_for_theirs(
    forked: list[int],
) -> None:
    async def steps(number: int) -> int:
        pool, before = pool_of(number, FakeBackend(), (0,), command=("sleep", "9")), len(forked)
        pool.start(lambda: None)
        pool.watch(asyncio.get_running_loop(), lambda _worker: None)
        first, second, *_ = pool.workers
        pool.report(first, Event.READY)
        await rest()
        assert len(forked) - before == 2
        with (cost := Cost()).of_steps():
            pool.report(second, Event.EXITED)
            await asyncio.sleep(0)
        assert len(forked) - before == 3
        return cost["steps"]

    few, many = (asyncio.run(steps(number)) for number in (FEW, MANY))
    assert many < 1.5 * few


def test_stop_before_all_are_started_starts_no_more(forked: list[int]) -> None:
    async def run() -> None:
        pool = pool_of(100, FakeBackend())
        pool.start(lambda: None)
        pool.watch(asyncio.get_running_loop(), lambda _worker: None)
        pool.fill()
        begun = len(forked)
        for worker in pool.workers:
            worker.process = None  # nobody is there to be told
        pool.stop(0.0, quick=True)
        await asyncio.sleep(0)
        assert len(forked) == len(pool.workers) == begun < 100

    asyncio.run(run())


@pytest.mark.parametrize("serves", [False, True])
def test_service_of_which_not_all_can_be_started_ends(
    monkeypatch: pytest.MonkeyPatch, forked: list[int], serves: bool
) -> None:
    monkeypatch.setattr(FakeProcess, "fails_at", 50)

    async def run() -> None:
        pool = pool_of(100, backend := FakeBackend())
        pool.start(lambda: None)
        pool.watch(asyncio.get_running_loop(), lambda _worker: None)
        if serves:
            pool.report(next(iter(pool.workers)), Event.READY)
        pool.fill()
        with pytest.raises(SteerError, match="no more processes"):
            async with asyncio.timeout(_TIMEOUT_S):
                await (pool.startup.refused if serves else pool.startup.up)
        assert len(backend.there) == sum(worker.process is not None for worker in pool.workers)
        states = {worker.state for worker in pool.workers if not worker.process}
        assert states == {State.BACKOFF}  # so that to stop is to forget them

    asyncio.run(run())


def test_workers_that_an_adopter_cannot_start_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, forked: list[int]
) -> None:
    """Others serve: that it cannot start more is no reason to end."""
    monkeypatch.setattr(FakeProcess, "fails_at", 12)

    async def run() -> None:
        pool = pool_of(20, FakeBackend())
        await watched(pool)
        assert not pool.startup.refused.done()
        failed = [worker for worker in pool.workers if not worker.process]
        assert len(failed) == 20 - 8
        assert all(worker.failures for worker in failed)
        assert len(forked) == 12

    asyncio.run(run())


def test_lot_that_took_long_is_followed_by_a_smaller_one(
    monkeypatch: pytest.MonkeyPatch, forked: list[int]
) -> None:
    def took(batch: Batch, _step_s: float) -> None:
        batch.size = 2

    monkeypatch.setattr(Batch, "took", took)

    async def run() -> None:
        pool = pool_of(40, FakeBackend())
        pool.start(lambda: None)
        await watched(pool)

    asyncio.run(run())
    assert list(Counter(forked).values())[1:] == [2] * ((40 - 2 * MOST_TOGETHER) // 2)


async def crash_of_all(pool: WorkerPool) -> None:
    """All end in one turn of the loop; until each was started again, or that was tried."""
    for worker in pool.workers:
        pool.report(worker, Event.READY)
    await rest()
    FakeProcess.forked.clear()
    for worker in pool.workers:
        worker.process = None
        pool.report(worker, Event.EXITED)
    async with asyncio.timeout(_TIMEOUT_S):
        while not all(worker.process or worker.failures for worker in pool.workers):
            FakeProcess.turn += 1
            await asyncio.sleep(0)


def test_all_that_ended_at_once_are_started_in_lots(forked: list[int]) -> None:
    async def run() -> None:
        pool = pool_of(100, backend := FakeBackend())
        pool.start(lambda: None)
        await watched(pool)
        saved = backend.asked["saved"]
        await crash_of_all(pool)
        assert sorted(Counter(forked).values(), reverse=True) == [MOST_TOGETHER] * 12 + [4]
        assert len({worker.slot for worker in pool.workers}) == 100
        assert backend.asked["saved"] - saved <= 13 + 1

    asyncio.run(run())


def test_of_a_lot_that_cannot_be_started_again_those_are_that_can(
    monkeypatch: pytest.MonkeyPatch, forked: list[int]
) -> None:
    async def run() -> None:
        pool = pool_of(20, FakeBackend())
        pool.start(lambda: None)
        await watched(pool)

        def fork_all(launches: Sequence[Any], *_: object) -> list[FakeProcess]:
            if sum(bool(worker.process) for worker in pool.workers) + len(launches) > 12:
                raise KernelError("start a worker", "no more processes")
            return list(map(FakeProcess, launches))

        monkeypatch.setattr(process, "fork_all", fork_all)
        await crash_of_all(pool)
        assert sum(bool(worker.process) for worker in pool.workers) == 12
        assert all(worker.timer for worker in pool.workers if not worker.process)

    asyncio.run(run())


def test_one_that_waits_twice_to_be_started_again_is_started_once(forked: list[int]) -> None:
    async def run() -> None:
        pool = pool_of(4, FakeBackend())
        pool.start(lambda: None)
        pool.watch(asyncio.get_running_loop(), lambda _worker: None)
        first = next(iter(pool.workers))
        first.process = None
        pool.report(first, Event.EXITED)
        pool._supervision.restarts.restart_soon(first)
        pool._supervision.restarts.restart_soon(first)
        forked.clear()
        await rest()
        assert len(forked) == 1

    asyncio.run(run())
