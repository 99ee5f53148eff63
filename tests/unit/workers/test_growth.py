"""What is done once costs the same among ten workers and among hundreds, and what is done to
all of them costs as much for each. Operations are counted, never time."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from steer.controller.rollout import unreported
from steer.workers import steps
from steer.workers.handle import WorkerHandle
from steer.workers.intake import MOST_TOGETHER, Batch
from steer.workers.lifecycle import Event
from testkit.growth_fakes import (
    FEW,
    MANY,
    READY,
    Cost,
    FakeGuard,
    FakeService,
    OrderedBackend,
    Script,
    cost_of,
    pid_of,
    plan_for,
    rest,
)

EACH = ("messages to the guard", "processes", "joined", "proc")
ONCE = ("messages to the guard", "waits for the guard", "publications", "proc")


@pytest.fixture(autouse=True)
def steps_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long they take."""
    monkeypatch.setattr(Batch, "took", lambda *_: None)
    monkeypatch.setattr(steps, "_STEP_S", 3600.0)


def both(script: Script, home: Path) -> tuple[Cost, Cost]:
    few, many = (cost_of(script, home, workers) for workers in (FEW, MANY))
    return few, many


def test_a_notification(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        (worker,) = service.ready()
        with service.counted():
            service.pool.notified((pid_of(worker),), {"WATCHDOG": "1"})
            service.pool.notified((pid_of(worker),), READY)

    few, many = both(script, tmp_path)
    assert many == few
    assert not many["proc"]


def test_a_join_and_who_gets_ready_but_is_held(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        pool, spec = service.pool, service.plan.specs[0]
        with service.counted():
            pool.start_held([spec], pool.generation, True, lambda _: None)
            await rest()

    few, many = both(script, tmp_path)
    assert not many["publications"]
    assert [many[kind] for kind in ONCE] == [few[kind] for kind in ONCE]
    assert many["steps"] < 1.5 * few["steps"]


def test_one_publication_for_all_that_get_ready_in_one_turn(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        for worker in service.ready(MANY):
            service.pool.report(worker, Event.DRAIN)
        await rest()
        with service.counted():
            for worker in list(service.pool.workers):
                service.pool.report(worker, Event.UNDRAIN)
            await rest()

    few, many = both(script, tmp_path)
    assert few["publications"] == many["publications"] == 1
    assert few["messages to the guard"] == many["messages to the guard"] == 1
    assert many["steps"] / MANY < 1.5 * few["steps"] / FEW


def test_an_end_is_not_waited_for_by_the_guard(tmp_path: Path) -> None:
    """Which has nothing of its open that is chosen."""

    async def script(service: FakeService) -> None:
        (worker,) = service.ready()
        with service.counted():
            assert worker.process
            service.guard.drop(worker.process.key)

    few, many = both(script, tmp_path)
    assert many == few
    assert not many["waits for the guard"]


def test_a_reload(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        with service.counted():
            await service.changes.renew(service.plan, unreported)
            assert {worker.generation.number for worker in service.ready(MANY)} == {2}
            assert service.cost["publications"] == 1
            while len(service.pool.workers) > len(service.plan.specs):
                await rest()

    few, many = both(script, tmp_path)
    assert [many[kind] / MANY for kind in EACH] <= [few[kind] / FEW for kind in EACH]
    assert many["publications"] / MANY < few["publications"] / FEW
    assert not many["waits for the guard"]
    assert many["steps"] / MANY < 1.5 * few["steps"] / FEW
    # They are ready at once, so most are started, and the guard is told of them, in full batches.
    batches, ends = MANY / MOST_TOGETHER, MANY
    assert many["lots of forks"] < 2 * batches
    assert many["messages to the guard"] < 5 * batches + ends


def test_those_that_are_admitted_together_are_saved_no_more_for_it(tmp_path: Path) -> None:
    """The turn in which hundreds are would take the longest of all."""

    async def script(service: FakeService) -> None:
        was = service.pool.activate

        def activate(workers: Sequence[WorkerHandle]) -> None:
            with service.counted() as cost:
                was(workers)
            seen.update(cost)

        service.pool.activate = activate  # type: ignore[method-assign]
        await service.changes.renew(service.plan, unreported)

    seen: Counter[str] = Counter()
    cost_of(script, tmp_path, MANY)
    assert set(seen) == {"steps"}
    assert seen["steps"] < 50 * MANY


def test_a_reload_where_the_order_of_sockets_is_kept(tmp_path: Path) -> None:
    """The order of all is told once for each batch that joins or leaves, so bytes still grow with
    the square of workers, but by a number for each worker and batch, and not for each worker and
    worker."""

    async def script(service: FakeService) -> None:
        with service.counted(steps=False):
            await service.changes.renew(service.plan, unreported)
            while len(service.pool.workers) > len(service.plan.specs):
                await rest()

    few, many = (
        cost_of(script, tmp_path, workers, backend=OrderedBackend) for workers in (FEW, MANY)
    )
    for kind in ("messages to the guard", "waits for the guard"):
        assert many[kind] / MANY <= few[kind] / FEW, kind
    assert many["messages to the guard"] < MANY
    # Their ends are seen in batches: the guard has closed their sockets before they leave.
    assert many["waits for the guard"] < MANY / 4


def test_a_start_where_the_order_of_sockets_is_kept(tmp_path: Path) -> None:
    """All that is told in a lot costs the same, but for the order of all, once for those who join
    and once for those who are chosen."""

    async def script(_: FakeService) -> None:
        """What is counted from the first on is the start."""

    few, many = (
        cost_of(script, tmp_path, workers, backend=OrderedBackend) for workers in (FEW, MANY)
    )
    assert many["messages to the guard"] / MANY <= few["messages to the guard"] / FEW
    assert not many["waits for the guard"]
    number = len(str(MANY)) + 1
    orders = 2 * (MANY / MOST_TOGETHER) * number * MANY / 2
    assert many["bytes to the guard"] < orders + 1.1 * MANY * few["bytes to the guard"] / FEW


def test_a_stop_waits_once_for_the_guard_to_close_sockets(tmp_path: Path) -> None:
    """However many it holds."""

    async def script(service: FakeService) -> None:
        with service.counted():
            service.pool.stop(30.0, quick=True)
            assert service.cost["waits for the guard"] == 1
            await service.pool.shutdown.ended

    few, many = (
        cost_of(script, tmp_path, workers, backend=OrderedBackend) for workers in (FEW, MANY)
    )
    assert many["waits for the guard"] == few["waits for the guard"] == 1
    for kind in ("messages to the guard", "bytes to the guard"):
        assert many[kind] / MANY <= few[kind] / FEW, kind
    assert many["steps"] / MANY < 1.5 * few["steps"] / FEW


@pytest.mark.parametrize("workers", [FEW, 1000])
def test_the_guard_is_waited_for_once_by_all_that_let_go_together(
    tmp_path: Path, workers: int
) -> None:
    cost = Cost()
    guard = FakeGuard(tmp_path, cost)
    with guard.together():
        for key in range(workers):
            guard.put(str(key), b"", (0, 1, 2, 3))
    assert not cost["waits for the guard"]
    cost.clear()
    with guard.together():
        for key in range(workers):
            guard.put(str(key), b"", (0, 1, 2))
    assert (cost["messages to the guard"], cost["waits for the guard"]) == (1, 1)


def test_those_that_end_together_leave_in_the_order_that_the_guard_knows(tmp_path: Path) -> None:
    """As who adopts a controller that is killed meanwhile takes them out of it."""
    left: list[int] = []

    async def script(service: FakeService) -> None:
        def leave(slot: int) -> None:
            left.append(slot)
            was(slot)

        was, service.backend.remove_member = service.backend.remove_member, leave  # type: ignore[method-assign]
        there, order = service.ready(FEW), list(cast(OrderedBackend, service.backend).order)
        for worker in reversed(there):
            cast(Any, worker.process).exit(signal.SIGKILL)
        await rest()
        assert left == order

    cost_of(script, tmp_path, FEW, backend=OrderedBackend)
    assert len(left) == FEW


def test_a_scale(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        half = plan_for(len(service.plan.specs) // 2)
        with service.counted():
            await service.changes.scale(half, unreported)
            while len(service.pool.workers) > len(half.specs):
                await rest()

    few, many = both(script, tmp_path)
    assert many["publications"] / MANY < few["publications"] / FEW
    assert many["steps"] / MANY < 1.5 * few["steps"] / FEW


def test_a_policy_change(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        with service.counted():
            service.pool.switch_policy(plan_for(len(service.plan.specs), "cpu"))

    few, many = both(script, tmp_path)
    assert many["publications"] == few["publications"] == 1
    assert many["messages to the guard"] == few["messages to the guard"]
    assert not many["looks at a worker"]
    assert many["steps"] / MANY < 1.5 * few["steps"] / FEW


def test_who_keeps_its_spec_is_not_saved_for_another_policy(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        with service.counted():
            service.pool.switch_policy(plan_for(len(service.plan.specs), "hash"))

    assert not cost_of(script, tmp_path, FEW)["saves of a worker"]


def test_workers_are_pinned_as_there_is_time_in_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one, where there is none."""
    turns: list[int] = []

    async def script(service: FakeService) -> None:
        was = service.pool.retry.attempt
        pinned = 0

        def attempt(act: str, do: Callable[[], object]) -> bool:
            nonlocal pinned
            pinned += act.startswith("pin ")
            return was(act, do)

        service.pool.retry.attempt = attempt  # type: ignore[method-assign]
        service.pool.switch_policy(plan_for(len(service.plan.specs), "cpu"))
        while pinned < len(service.plan.specs):
            turns.append(pinned)
            await asyncio.sleep(0)

    monkeypatch.setattr(steps, "_STEP_S", 0.0)
    cost_of(script, tmp_path, FEW)
    assert turns == [*range(1, FEW)]
