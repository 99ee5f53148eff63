"""Whatever happens to workers, in whatever order: those that serve are chosen, and nobody else.

The pool, its selection, the changes and the guard's client are the real ones; workers and the
backend are fakes, and nothing waits for time to pass.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steer.config.plan import Plan
from steer.controller.rollout import unreported
from steer.linux.log import Log
from steer.workers import ends, handle, process, steps
from steer.workers.handle import WorkerHandle
from steer.workers.intake import Batch
from steer.workers.lifecycle import Event, State
from steer.workers.spares import has_failed
from testkit.growth_fakes import FakeService, OrderedBackend, pid_of, plan_for, rest

WORKERS = 4
NUMBERS = st.integers(0, 2 * WORKERS)
TOLD = [Event.DRAIN, Event.LEAVES, Event.UNDRAIN, Event.STUCK, Event.BACK]


class WoundLoop(asyncio.SelectorEventLoop):
    """In which time passes only when it is wound: timers are due when the test says so."""

    now_s = 1000.0

    def time(self) -> float:
        return self.now_s


class Workers(RuleBasedStateMachine):
    backend = OrderedBackend
    spares = 0

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="steer-test-"))
        self.loop = WoundLoop()
        self.is_stopping = False
        self.undo = pytest.MonkeyPatch()
        # Steps are full, however long they take.
        self.undo.setattr(Batch, "took", lambda *_: None)
        self.undo.setattr(steps, "_STEP_S", 3600.0)
        for module in (ends, handle):
            self.undo.setattr(module, "time", SimpleNamespace(monotonic=self.loop.time))
        self.bugs: list[str] = []
        self.undo.setattr(Log, "error", lambda _, text, *values: self.bugs.append(text % values))

        async def up() -> FakeService:
            service = FakeService(self.home, WORKERS, backend=self.backend, spares=self.spares)
            self.undo.setattr(process, "fork_all", service.fork_all)
            await service.up()
            return service

        self.service = self.loop.run_until_complete(up())
        self.settle()

    @property
    def workers(self) -> list[WorkerHandle]:
        return list(self.service.pool.workers)

    def settle(self) -> None:
        self.loop.run_until_complete(self.rested())

    async def rested(self) -> None:
        """What is looked at again in a moment has been."""
        for _ in range(4):
            await rest()
            self.loop.now_s += 0.05

    def one(self, number: int, *states: State) -> WorkerHandle | None:
        there = [each for each in self.workers if not states or each.state in states]
        return there[number % len(there)] if there else None

    def report(self, worker: WorkerHandle | None, event: Event) -> None:
        async def tell() -> None:
            if worker is not None:
                self.service.pool.report(worker, event)
            await self.rested()

        self.loop.run_until_complete(tell())

    @rule(number=NUMBERS, event=st.sampled_from(TOLD))
    def something_happens_to_anyone(self, number: int, event: Event) -> None:
        """Also where it means nothing."""
        self.report(self.one(number), event)

    @rule(number=NUMBERS)
    def drained(self, number: int) -> None:
        self.report(self.one(number, State.READY, State.HUNG), Event.DRAIN)

    @rule(number=NUMBERS)
    def undrained(self, number: int) -> None:
        self.report(self.one(number, State.DRAINING), Event.UNDRAIN)

    @rule(number=NUMBERS)
    def hangs(self, number: int) -> None:
        self.report(self.one(number, State.READY), Event.STUCK)

    @rule(number=NUMBERS)
    def is_back(self, number: int) -> None:
        self.report(self.one(number, State.HUNG), Event.BACK)

    @rule(seconds=st.sampled_from([0.3, 5.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.loop.now_s += seconds
        self.settle()

    @rule(number=NUMBERS, is_told_twice=st.booleans())
    def ready(self, number: int, is_told_twice: bool) -> None:
        """It says so at any time, and more than once."""

        async def tell() -> None:
            for worker in self.workers[: 1 + is_told_twice]:
                if worker.process:
                    self.service.pool.notified((pid_of(worker),), {"READY": "1"})
            await self.rested()

        self.loop.run_until_complete(tell())

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=WORKERS))
    def killed(self, numbers: list[int]) -> None:
        """Several in one turn of the loop."""

        async def kill() -> None:
            for worker in {self.one(number) for number in numbers}:
                if worker and worker.process:
                    cast(Any, worker.process).exit(signal.SIGKILL)
            await self.rested()

        self.loop.run_until_complete(kill())

    @precondition(lambda self: not self.is_stopping)
    @rule(workers=st.integers(1, WORKERS))
    def scaled(self, workers: int) -> None:
        self.change(self.service.changes.scale(self.plan(workers), unreported))

    @precondition(lambda self: not self.is_stopping)
    @rule(workers=st.integers(1, WORKERS))
    def reloaded(self, workers: int) -> None:
        self.change(self.service.changes.renew(self.plan(workers), unreported))

    def plan(self, workers: int) -> Plan:
        return plan_for(workers, spares=self.spares)

    def change(self, coroutine: Any) -> None:
        async def do() -> None:
            await asyncio.wait_for(coroutine, 10)
            await self.rested()

        self.loop.run_until_complete(do())

    @invariant()
    def those_that_serve_are_chosen_and_nobody_else(self) -> None:
        ready = (worker for worker in self.workers if worker.state is State.READY)
        serving = {worker.slot for worker in ready if not worker.spec.is_spare}
        assert {member.slot for member in self.service.backend.members} == serving

    @invariant()
    def each_has_a_slot_and_a_process_of_its_own(self) -> None:
        there = self.workers
        assert len({worker.slot for worker in there}) == len(there)
        pids = [pid_of(worker) for worker in there if worker.process]
        assert len(set(pids)) == len(pids)
        for worker in there:
            assert (worker.process is None) <= (worker.state in (State.BACKOFF, State.STARTING))

    @invariant()
    def the_order_is_of_those_whose_sockets_are_there(self) -> None:
        order = cast(OrderedBackend, self.service.backend).order
        assert set(order) >= {worker.slot for worker in self.workers if worker.state is State.READY}
        assert set(order) <= {worker.slot for worker in self.workers if worker.process}

    @invariant()
    def the_guard_has_those_that_are_there(self) -> None:
        kept = {key for key in self.service.guard.entries if key.startswith("worker")}
        assert kept >= {f"worker {pid_of(worker)}" for worker in self.workers if worker.serves}
        assert kept <= {f"worker {pid_of(worker)}" for worker in self.workers if worker.process}

    @invariant()
    def nothing_is_said_to_be_wrong(self) -> None:
        assert not [each for each in self.bugs if "bug in steer" in each]

    def teardown(self) -> None:
        self.undo.undo()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        shutil.rmtree(self.home)


class WorkersWithSpares(Workers):
    """As many serve as were asked for, as long as there are spares."""

    spares = 2

    @invariant()
    def each_spec_is_of_one_worker(self) -> None:
        specs = [worker.spec for worker in self.workers if not worker.is_retiring]
        wanted = () if self.is_stopping else self.service.pool.generation.plan.all_specs
        assert sorted(spec.number for spec in specs) == [spec.number for spec in wanted]

    @invariant()
    def no_spare_waits_while_a_worker_has_failed(self) -> None:
        failed = [worker for worker in self.workers if has_failed(worker)]
        ready = [worker for worker in self.workers if worker.is_ready_spare]
        assert not ready or all(worker.spec.is_spare for worker in failed)


TestWorkers, TestWorkersWithSpares = Workers.TestCase, WorkersWithSpares.TestCase
TestWorkers.settings = TestWorkersWithSpares.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
