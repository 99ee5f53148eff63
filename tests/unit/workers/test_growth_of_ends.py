"""How much is done when workers end, counted with fakes, of few and of many workers."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from steer.backends.without_ebpf import WithoutEbpf
from steer.config.plan import Generation
from steer.errors import WorkersFailed
from steer.linux.family import Family
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.policy.layout import Member
from steer.sockets import sock_diag
from steer.workers import elsewhere, ends, startup, steps
from steer.workers.handle import WorkerHandle
from steer.workers.intake import MOST_TOGETHER
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool
from testkit.fake_process import DEADLINE_S, FIRST, FakeProcess
from testkit.growth_fakes import plan_for

sizes = pytest.mark.parametrize("workers", [10, 1000])


class CountingGuard:
    """Of a service: what is sent to it, by act."""

    pid = FIRST - 1

    def __init__(self) -> None:
        self.sent = Counter[str]()
        self.dropped = set[str]()

    def put(self, *_: object) -> None:
        self.sent["put"] += 1

    def drop(self, *keys: str) -> None:
        self.sent["drop"] += not self.dropped.issuperset(keys)
        self.dropped.update(keys)

    def give_up(self) -> None:
        self.sent["give up"] += 1

    def let_go(self, *keys: str) -> None:
        assert not keys, "the backend holds no sockets"

    @contextmanager
    def together(self) -> Iterator[None]:
        yield


class CountingBackend(WithoutEbpf):
    """Holds no sockets."""

    name = "fake"
    needs_order = False
    anchors: Mapping[int, socket.socket] = {}
    controller_sockets = ()

    def __init__(self) -> None:
        self.members: Sequence[Member] = ()
        self.publications = 0
        self.gone = set[int]()
        self.membership: bool | None = None

    def steer(self, members: Sequence[Member]) -> None:
        self.members = members
        self.publications += 1

    def grace_period(self) -> None:
        """No program runs."""

    def remove_member(self, slot: int) -> None:
        self.gone.add(slot)

    def is_member(self, _slot: int, _bind: int) -> bool | None:
        return self.membership

    def release(self) -> None:
        pass

    def held(self, _slot: int) -> Sequence[int]:
        return ()

    def stored(self) -> tuple[object, Sequence[int]]:
        return None, ()


class ServingProcess(FakeProcess):
    """One that serves; it crashes unless it is told to end."""

    def __init__(self, pid: int, guard: CountingGuard) -> None:
        super().__init__(pid, told_to_finish=False)
        self._guard = guard
        self.bound = self.inodes = (pid,)
        self.problem, self.last_words, self.why_this_signal = None, "", ""
        self.launch = SimpleNamespace(
            service=SimpleNamespace(command=(), ready_timeout=60.0, adopts=False), binds=()
        )

    @property
    def key(self) -> str:
        return str(self.pid)

    @property
    def running(self) -> None:
        return None

    def keep(self, *_: object) -> None:
        self._guard.put()

    def terminate(self, _quick: bool) -> None:
        self.told_to_finish = True

    def let_go(self) -> int:
        self._guard.drop(self.key)
        super().let_go()
        return 0 if self.told_to_finish else -9


class Serving:
    """A service of so many workers, all ready.

    Attributes:
        looks: at who is left of workers.
        dumps: of all sockets of a port.
        starts: of others in place of those that ended; each fails.
        steps_told: how many were told to end in each turn of the loop.
    """

    def __init__(self, workers: int) -> None:
        self.guard, self.backend = CountingGuard(), CountingBackend()
        self.looks = self.dumps = self.starts = 0
        self.steps_told: list[int] = []
        generation = Generation(1, plan_for(workers))
        log, loop = Log("error", "text"), asyncio.get_running_loop()
        self.pool = WorkerPool(
            generation,
            2 * workers,
            cast(Any, self.backend),
            cast(Any, self.guard),
            self._refuse,
            log,
            Retry(log, Spare(0)),
            cast(Any, None),
        )
        self.processes = [ServingProcess(FIRST + slot, self.guard) for slot in range(workers)]
        for spec, process in zip(generation.plan.specs, self.processes, strict=True):
            worker = WorkerHandle(spec, spec.number, generation, State.READY, ready_s=0.0)
            worker.process = cast(Any, process)
            self.pool.workers.add(worker)
        self.pool.watch(loop, lambda _worker: None)
        self.guard.sent.clear()

    def _refuse(self, _worker: WorkerHandle) -> NoReturn:
        self.starts += 1
        raise WorkersFailed("start workers", "no more")

    def find(self, families: Sequence[Family], _beside: Collection[int]) -> list[list[int]]:
        self.looks += 1
        return [[] for _ in families]

    def waiting(self, *_: object) -> dict[int, object]:
        self.dumps += 1
        return {}

    def fail_at_start(self) -> None:
        """As if no worker had ever been ready."""
        self.pool.startup.up = asyncio.get_running_loop().create_future()
        for worker in self.pool.workers:
            worker.ready_s = None

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():
                await asyncio.sleep(0)

    async def until_gone(self, slots: Collection[int]) -> None:
        """All of these have ended, and that was seen to."""
        workers = [worker for worker in self.pool.workers if worker.slot in slots]
        await self.until(lambda: not any(worker.process for worker in workers))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a service of so many workers, and let a test do something to it."""

    def played(workers: int, script: Callable[[Serving], Any]) -> Serving:
        async def run() -> Serving:
            serving = Serving(workers)
            monkeypatch.setattr(serving.pool._supervision.ends, "_find", serving.find)
            monkeypatch.setattr(sock_diag, "waiting", serving.waiting)
            await script(serving)
            return serving

        return asyncio.run(run())

    return played


Play = Callable[[int, Callable[[Serving], Any]], Serving]


@sizes
def test_one_that_dies_costs_the_same_among_many(play: Play, workers: int) -> None:
    async def script(serving: Serving) -> None:
        serving.processes[3].first_ends()
        await serving.until_gone({3})
        await serving.until(lambda: len(serving.backend.members) == workers - 1)

    serving = play(workers, script)
    assert (serving.looks, serving.dumps) == (1, 1)
    assert 3 in serving.backend.gone
    assert len(serving.backend.gone) <= 2, "and another that could not be started"
    assert serving.backend.publications <= 2, "at the start, and without it"
    assert serving.guard.sent["drop"] == 1
    assert serving.guard.sent["put"] <= 4


@sizes
def test_all_that_die_at_once_are_looked_at_together(play: Play, workers: int) -> None:
    async def script(serving: Serving) -> None:
        for process in serving.processes:
            process.first_ends()
        await serving.until_gone(range(workers))
        await serving.until(lambda: not serving.backend.members)

    serving = play(workers, script)
    steps = -(-workers // ends.MOST)
    assert (serving.looks, serving.dumps) == (steps, steps)
    assert serving.backend.gone >= set(range(workers))
    assert serving.backend.publications <= steps + 1


@sizes
def test_where_the_kernel_tells_that_sockets_are_closed_no_port_is_looked_at(
    play: Play, workers: int
) -> None:
    async def script(serving: Serving) -> None:
        serving.backend.membership = False
        for process in serving.processes:
            process.first_ends()
        await serving.until_gone(range(workers))

    assert play(workers, script).dumps == 0


@sizes
def test_a_stop_looks_at_each_once_and_saves_nothing(play: Play, workers: int) -> None:
    async def script(serving: Serving) -> None:
        serving.pool.stop(30.0, quick=False)
        await serving.until(lambda: all(each.told_to_finish for each in serving.processes))
        for process in serving.processes:
            process.first_ends()
        async with asyncio.timeout(DEADLINE_S):
            await serving.pool.shutdown.ended

    serving = play(workers, script)
    assert (serving.looks, serving.dumps) == (-(-workers // ends.MOST), 0)
    steps = -(-workers // ends.MOST)
    assert serving.guard.sent == {"give up": 1, "drop": steps + 1}, "those and the selection"
    assert serving.backend.publications == 1, "at the start"


def test_one_that_dies_before_it_is_told_to_end_is_not_started_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one worker is told in a turn of the loop."""

    async def script(serving: Serving) -> None:
        serving.pool.stop(30.0, quick=False)
        assert [each.told_to_finish for each in serving.processes] == [True] + 99 * [False]
        for worker in reversed(serving.processes):
            worker.first_ends()
        async with asyncio.timeout(DEADLINE_S):
            await serving.pool.shutdown.ended
        assert not serving.starts

    monkeypatch.setattr(steps, "_STEP_S", 0.0)
    play(100, script)


@sizes
def test_when_all_fail_at_the_start_few_are_looked_at(
    play: Play, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is asked once more or less whether it could still come up."""
    looked_at: list[object] = []
    asked = Counter[int]()

    def has_failed(worker: WorkerHandle) -> bool:
        asked[worker.slot] += 1
        return worker.failures > 0

    async def script(serving: Serving) -> None:
        serving.fail_at_start()
        for worker in serving.pool.workers:
            worker.state = State.STARTING
        for process in serving.processes:
            process.first_ends()
        await serving.until(serving.pool.startup.up.done)
        assert isinstance(serving.pool.startup.up.exception(), WorkersFailed)

    monkeypatch.setattr(startup, "_has_failed", has_failed)
    monkeypatch.setattr(elsewhere, "diagnosis", looked_at.append)
    play(workers, script)
    assert len(looked_at) <= 8 * (workers // ends.MOST + 3)
    assert asked.total() <= 4 * workers


@sizes
def test_of_all_that_died_at_once_a_lot_is_started_in_a_turn(play: Play, workers: int) -> None:
    """Here all that fail, so each of them once more by itself."""

    async def script(serving: Serving) -> None:
        for process in serving.processes:
            process.first_ends()
        await serving.until(lambda: serving.starts > 0)
        for turn in range(2, 10):
            await asyncio.sleep(0)
            assert serving.starts <= turn * (MOST_TOGETHER + 1)

    play(workers, script)
