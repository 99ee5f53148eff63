"""Changes, step by step: workers that come up, fail and end just when the test says so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from steer.config import plan_change, planning
from steer.config.plan import Generation, Plan, WorkerSpec
from steer.config.service import Service
from steer.controller.rollout import Rollout, unreported
from steer.controller.turns import Turns
from steer.errors import ControlError, WorkersFailed
from steer.features import Answer, Finding
from steer.policy.cpus import Topology
from steer.workers import lifecycle
from steer.workers.handle import WorkerHandle
from steer.workers.intake import Batch
from steer.workers.lifecycle import Command, Event, State
from steer.workers.pool import WorkerPool
from steer.workers.process import Running
from steer.workers.stored_worker import StoredWorker, restored, stored

CPUS = (0, 1, 2, 3)
ENDED = WorkersFailed("start workers", "exit status 7")


def plan_for(workers: int, **keys: Any) -> Plan:
    topology = Topology(CPUS, CPUS, {})
    service = Service(workers=workers, **keys)
    return planning.plan(service, topology, {"ebpf": Finding(Answer.YES)})


class FakePool:
    """Places without processes.

    Attributes:
        publications: at each, the slots that may be chosen.
    """

    def __init__(self, workers: int, spares: int) -> None:
        self.generation = Generation(1, plan_for(workers, spares=spares))
        self.workers: list[WorkerHandle] = []
        self.publications: list[list[int]] = []
        self.kept: list[tuple[int, int, int]] = []
        self.batch = Batch()
        self.selection = self.publisher = self
        self.activated = 0
        self.preloaded: list[str] = []
        self._slot = 0
        for spec in self.generation.plan.all_specs:
            self._take(spec, self.generation).state = State.READY

    @asynccontextmanager
    async def preloading(self, generation: Generation) -> AsyncIterator[None]:
        self.preloaded.append(f"begin {generation.number}")
        try:
            yield
        except BaseException:
            self.preloaded.append(f"undo {generation.number}")
            raise
        self.preloaded.append(f"end {generation.number}")

    def _take(self, spec: WorkerSpec, generation: Generation) -> WorkerHandle:
        worker = WorkerHandle(spec, self._slot, generation)
        self._slot += 1
        self.workers.append(worker)
        return worker

    def start_held(
        self,
        specs: Sequence[WorkerSpec],
        generation: Generation,
        _niced: bool,
        on_outcome: Callable[[WorkerHandle], None],
    ) -> list[WorkerHandle]:
        workers = [self._take(spec, generation) for spec in specs]
        for worker in workers:
            worker.held, worker.on_outcome = True, on_outcome
        return workers

    def give_spec(self, worker: WorkerHandle, spec: WorkerSpec) -> None:
        assert worker.held
        worker.change_spec(spec)

    def activate(self, workers: Sequence[WorkerHandle]) -> None:
        for worker in workers:
            worker.held = False
        self.activated += 1

    def report(self, worker: WorkerHandle, event: Event) -> None:
        worker.state, commands = lifecycle.step(worker.state, event)
        if Command.FORGET in commands:
            self.workers.remove(worker)

    def retire(self, workers: Sequence[WorkerHandle]) -> None:
        for worker in workers:
            self.report(worker, Event.RETIRE)

    async def published(self) -> None:
        self.publications.append([worker.slot for worker in self.workers if worker.serves])

    # What happens to workers.

    def get_ready(self, slot: int) -> None:
        worker = self.at(slot)
        self.report(worker, Event.READY)
        assert worker.on_outcome is not None
        worker.on_outcome(worker)

    def fail(self, slot: int) -> None:
        worker = self.at(slot)
        worker.error = ENDED
        self.report(worker, Event.RETIRE)
        self.report(worker, Event.EXITED)
        assert worker.on_outcome is not None
        worker.on_outcome(worker)

    def at(self, slot: int) -> WorkerHandle:
        return next(worker for worker in self.workers if worker.slot == slot)

    def states(self) -> dict[int, State]:
        return {worker.slot: worker.state for worker in self.workers}


Script = Callable[[FakePool, Rollout], Coroutine[Any, Any, None]]


def play(workers: int, script: Script, spares: int = 0) -> FakePool:
    """A service of so many workers, and what happens to it."""
    pool = FakePool(workers, spares)

    async def run() -> None:
        changes = Rollout(
            cast(WorkerPool, pool),
            lambda new, now: pool.kept.append((new.number, now.number, pool.activated)),
            Turns(),
            pool.preloading,
        )
        await asyncio.wait_for(script(pool, changes), 10)

    asyncio.run(run())
    return pool


async def rest() -> None:
    """Until everybody waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


def begin(change: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(change)


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(CPUS))


def test_half_the_cpus_start_workers_and_one_more_begins_and_all_are_told_of() -> None:
    told: list[tuple[str, int, int]] = []

    async def script(pool: FakePool, changes: Rollout) -> None:
        renewal = begin(changes.renew(plan_for(4), lambda *how_far: told.append(how_far)))
        await rest()
        assert [worker.slot for worker in pool.workers] == [0, 1, 2, 3]
        pool.get_ready(2)
        await rest()
        assert [worker.slot for worker in pool.workers] == [0, 1, 2, 3, 4]
        pool.get_ready(1)
        pool.get_ready(4)
        await rest()
        assert pool.publications == []
        pool.get_ready(3)
        assert (await renewal).number == 2

    pool = play(1, script)
    assert told == [("ready", done, 4) for done in (0, 1, 2, 3, 4)]
    assert pool.publications == [[1, 2, 3, 4]]
    assert pool.states()[0] is State.STOPPING
    # The guard knows of the new one before there are workers of it.
    assert pool.kept == [(2, 1, 0), (2, 2, 1)]


def test_one_that_fails_takes_the_others_with_it() -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        renewal = begin(changes.renew(plan_for(3), unreported))
        await rest()
        pool.get_ready(2)
        await rest()
        pool.fail(3)
        with pytest.raises(WorkersFailed, match="exit status 7"):
            await renewal

    pool = play(2, script)
    assert pool.generation.number == 1
    assert pool.publications == []
    assert pool.states() == {
        0: State.READY,
        1: State.READY,
        2: State.STOPPING,
        4: State.STOPPING,
    }
    assert pool.kept == [(2, 1, 0)]


def test_one_that_was_ready_and_failed_since_counts_as_failed() -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        renewal = begin(changes.renew(plan_for(2), unreported))
        await rest()
        pool.get_ready(1)
        await rest()
        pool.fail(1)
        pool.get_ready(2)
        with pytest.raises(WorkersFailed, match="exit status 7"):
            await renewal

    pool = play(1, script)
    assert pool.states() == {0: State.READY, 2: State.STOPPING}


def test_one_that_is_ready_and_says_that_it_ends_counts_as_failed() -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        renewal = begin(changes.renew(plan_for(1), unreported))
        await rest()
        pool.get_ready(1)
        pool.report(pool.at(1), Event.DRAIN)
        with pytest.raises(WorkersFailed, match="one is draining"):
            await renewal

    assert play(1, script).states()[0] is State.READY


@pytest.mark.parametrize("when", ["before any is ready", "just as all are"])
def test_end_of_the_service_ends_a_change(when: str) -> None:
    async def renew(changes: Rollout) -> None:
        async with changes.turns.turn("reload demo"):
            await changes.renew(plan_for(4), unreported)

    async def script(pool: FakePool, changes: Rollout) -> None:
        first, second = begin(renew(changes)), begin(renew(changes))
        await rest()
        if when == "just as all are":
            for slot in (1, 2, 3):
                pool.get_ready(slot)
                await rest()
            pool.get_ready(4)
        changes.turns.end()
        for worker in list(pool.workers):
            pool.report(worker, Event.STOP)
        if when == "before any is ready":
            pool.fail(1)
        for change in (first, second):
            with pytest.raises(ControlError, match=r"^reload demo: the service is ending$"):
                await change

    pool = play(1, script)
    # None was started since, and none activated.
    assert len(pool.workers) == (3 if when == "before any is ready" else 5)
    assert set(pool.states().values()) == {State.STOPPING}
    assert pool.publications == []
    assert pool.generation.number == 1


def test_changes_take_turns() -> None:
    async def renew(changes: Rollout) -> int:
        async with changes.turns.turn("reload demo"):
            return (await changes.renew(plan_for(1), unreported)).number

    async def script(pool: FakePool, changes: Rollout) -> None:
        first, second = begin(renew(changes)), begin(renew(changes))
        for slot in (1, 2):
            await rest()
            assert list(pool.states()) == list(range(slot + 1))
            pool.get_ready(slot)
        assert [await first, await second] == [2, 3]

    assert play(1, script).publications == [[1], [2]]


def test_no_change_begins_when_the_service_ends() -> None:
    async def script(_pool: FakePool, changes: Rollout) -> None:
        changes.turns.end()
        with pytest.raises(ControlError, match=r"^divide: the service is ending$"):
            async with changes.turns.turn("divide"):
                pytest.fail("it began")

    play(1, script)


OUT = [State.DRAINING, State.HUNG, State.BACKOFF, State.STARTING]


@pytest.mark.parametrize("state", OUT)
def test_last_that_serves_is_not_scaled_away(state: State) -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        pool.at(0).state = state
        scaling = begin(changes.scale(plan_for(1), unreported))
        await rest()
        assert pool.at(1).state is State.READY
        pool.get_ready(2)
        await scaling

    pool = play(2, script)
    assert pool.publications == [[2]]
    assert pool.at(1).state is State.STOPPING
    assert pool.at(2).spec == pool.generation.plan.specs[0]


@pytest.mark.parametrize("state", OUT)
def test_who_stays_need_not_serve_where_another_does(state: State) -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        pool.at(0).state = state
        await changes.scale(plan_for(2), unreported)

    pool = play(3, script)
    assert pool.publications == [[1]]
    assert pool.states() == {0: state, 1: State.READY, 2: State.STOPPING}


def test_one_on_its_way_out_leaves_its_spec() -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        pool.at(1).state = State.STOPPING
        scaling = begin(changes.scale(plan_for(2), unreported))
        await rest()
        pool.get_ready(2)
        await scaling

    pool = play(2, script)
    assert pool.publications == [[0, 2]]
    assert pool.at(2).spec == pool.at(1).spec
    assert pool.generation.number == 1


def test_none_serves_when_scaled_to_none() -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        running = pool.generation.plan
        await changes.scale(plan_change.scaled(running, 0, running.topology), unreported)

    pool = play(2, script)
    assert pool.publications == [[]]
    assert set(pool.states().values()) == {State.STOPPING}


def test_restart_takes_the_seat_over() -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        restarting = begin(changes.restart(pool.at(1), unreported))
        await rest()
        assert pool.at(1).state is State.READY
        pool.get_ready(3)
        assert await restarting is pool.at(3)

    pool = play(3, script)
    assert pool.publications == [[0, 2, 3]]
    assert pool.at(3).spec == pool.at(1).spec


@pytest.mark.parametrize("old, other", [(1, 3), (3, 1)])
def test_one_that_is_replaced_may_exchange_its_spec_with_a_spare_meanwhile(
    old: int, other: int
) -> None:
    """It fails, or it is the spare that takes the place of another."""

    async def script(pool: FakePool, changes: Rollout) -> None:
        restarting = begin(changes.restart(pool.at(old), unreported))
        await rest()
        pool.at(old).spec, pool.at(other).spec = pool.at(other).spec, pool.at(old).spec
        pool.get_ready(4)
        await restarting

    pool = play(3, script, spares=1)
    assert pool.publications == [[0, 2, 3] if old == 1 else [0, 2, 4]]
    left = [worker.spec.number for worker in pool.workers if not worker.is_retiring]
    assert sorted(left) == [spec.number for spec in pool.generation.plan.all_specs]


def test_spares_are_kept_when_scaled_and_renewed_by_a_reload() -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        scaling = begin(changes.scale(plan_for(3, spares=1), unreported))
        await rest()
        pool.get_ready(3)
        await scaling
        reloading = begin(changes.renew(plan_for(1, spares=2), unreported))
        for slot in (4, 5, 6):
            await rest()
            pool.get_ready(slot)
        await reloading

    pool = play(2, script, spares=1)
    assert pool.publications == [[0, 1, 3], [4]]
    spares = [worker.slot for worker in pool.workers if worker.is_ready_spare]
    assert spares == [5, 6]


def is_hung(worker: WorkerHandle) -> bool:
    return worker.state is State.HUNG


@pytest.mark.parametrize("back", [False, True])
def test_one_that_hangs_is_replaced_unless_it_is_back_first(back: bool) -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        pool.at(1).state = State.HUNG
        relief = begin(changes.replace(pool.at(1), is_hung))
        await rest()
        if back:
            pool.report(pool.at(1), Event.BACK)
        pool.get_ready(2)
        await relief

    pool = play(2, script)
    gone, stays = (2, 1) if back else (1, 2)
    assert pool.at(gone).state is State.STOPPING
    assert pool.at(stays).serves
    assert pool.kept == ([] if back else [(1, 1, 1)]), "or who adopts us would let it go"


@pytest.mark.parametrize("state", [State.READY, State.STOPPING, State.BACKOFF])
def test_one_that_does_not_hang_any_more_is_not_replaced(state: State) -> None:
    async def script(pool: FakePool, changes: Rollout) -> None:
        pool.at(1).state = state
        await changes.replace(pool.at(1), is_hung)

    assert list(play(2, script).states()) == [0, 1]


@pytest.mark.parametrize("activated, is_held", [(3, True), (4, False), (5, False)])
def test_who_adopts_takes_those_for_activated_whose_change_was(
    activated: int, is_held: bool
) -> None:
    """As each was saved when it was not yet."""
    generation = Generation(2, plan_for(1))
    spec = generation.plan.specs[0]
    worker = WorkerHandle(spec, 0, generation, State.READY, held=True, change=4)
    value = msgspec.json.encode(stored(worker, Running(1, 0.0, (), False)))
    saved = msgspec.json.decode(value, type=StoredWorker)
    assert restored(saved, generation, 0.0, activated).held == is_held
