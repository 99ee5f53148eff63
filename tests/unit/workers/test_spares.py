"""Spares: which takes the place of which worker, and what becomes of both."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from steer.config.plan import Generation
from steer.controller.rollout import unreported
from steer.policy import builtin
from steer.policy.builtin import POLICIES, LayoutContext
from steer.policy.cpus import Topology
from steer.policy.layout import Layout, Member
from steer.workers.ends import Ends
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Event, State
from steer.workers.spares import has_failed, spare_for
from testkit.growth_fakes import FakeService, Script, cost_of, plan_for, rest

RUNS, ENDED = SimpleNamespace(has_ended=False), SimpleNamespace(has_ended=True)
GENERATION, OTHER = (Generation(number, plan_for(2, spares=3)) for number in (1, 2))


def handle(spec: int, generation: Generation = GENERATION, **keys: Any) -> WorkerHandle:
    """Args: spec: 0 and 1 are of workers, 2 to 4 of spares."""
    keys = {"state": State.READY, "process": RUNS, "ready_s": 9.0, **keys}
    return WorkerHandle(generation.plan.all_specs[spec], spec, generation, **keys)


# Which


def test_the_spare_that_has_been_ready_the_longest_is_chosen() -> None:
    spares = [handle(2, ready_s=3.0), handle(3, ready_s=1.0), handle(4, ready_s=2.0)]
    assert spare_for(handle(0), spares) is spares[1]


@pytest.mark.parametrize(
    "keys",
    [
        {"state": State.STARTING},
        {"state": State.HUNG},
        {"state": State.DRAINING},
        {"state": State.STOPPING},
        {"held": True},
        {"leaving": True},
        {"process": ENDED},
        {"process": None},
        {"departures": {0: "closed"}},
        {"generation": OTHER},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_spare_that_could_not_serve_is_not_chosen(keys: dict[str, Any]) -> None:
    later = handle(3, ready_s=10.0)
    assert spare_for(handle(0), [handle(1), handle(2, **keys), later]) is later
    assert spare_for(handle(0), [handle(1), handle(2, **keys)]) is None


@pytest.mark.parametrize(
    "worker",
    [
        handle(2, state=State.BACKOFF),
        handle(0, state=State.STOPPING),
        handle(0, state=State.GONE),
        handle(0, held=True),
        handle(0, leaving=True),
    ],
    ids=["spare", "stopping", "gone", "held", "leaving"],
)
def test_one_that_need_not_be_replaced(worker: WorkerHandle) -> None:
    assert spare_for(worker, [handle(3)]) is None


@pytest.mark.parametrize(
    "state, failures, expected",
    [
        (State.READY, 1, False),
        (State.DRAINING, 1, False),
        (State.HUNG, 0, True),
        (State.BACKOFF, 1, True),
        (State.BACKOFF, 0, False),
        (State.STARTING, 1, True),
        (State.STARTING, 0, False),
    ],
)
def test_who_has_failed(state: State, failures: int, expected: bool) -> None:
    """One that starts for the first time has not."""
    assert has_failed(handle(0, state=state, failures=failures)) is expected


@pytest.mark.parametrize("policy", ["hash", "source"])
def test_only_the_flows_of_the_one_that_failed_move(policy: str) -> None:
    def members(*slots: int) -> list[Member]:
        return [Member(slot, 5 if slot in (1, 3) else 1, None) for slot in slots]

    def layout(slots: list[Member], previous: Layout | None = None) -> Layout:
        context = LayoutContext(Topology((0,), (0,), {}), 4096, previous=previous)
        return builtin.build_layout(POLICIES[policy], slots, context)

    before = layout(members(0, 1, 2))
    after = layout(members(0, 2, 3), before)
    pairs = zip(before.entries, after.entries, strict=True)
    assert {pair for pair in pairs if pair[0] != pair[1]} == {(1, 3)}
    assert 1 not in after.entries


# In a pool


def play(script: Script, home: Path, workers: int = 3, spares: int = 1, **keys: Any) -> None:
    cost_of(script, home, workers, spares=spares, **keys)


def selected(service: FakeService) -> list[int]:
    return sorted(member.slot for member in service.backend.members)


def at(service: FakeService, slot: int) -> WorkerHandle:
    return next(worker for worker in service.pool.workers if worker.slot == slot)


def end(*workers: WorkerHandle) -> None:
    for worker in workers:
        cast(Any, worker.process).exit(signal.SIGKILL)


def spares(service: FakeService) -> list[int]:
    return [worker.slot for worker in service.pool.workers if worker.is_ready_spare]


async def until_ready(service: FakeService) -> None:
    await rest()  # for what was done just before
    while not all(worker.is_settled for worker in service.pool.workers):
        await rest()


def numbers(workers: Iterable[WorkerHandle]) -> list[int]:
    return [worker.spec.number for worker in workers]


def test_one_publication_puts_a_spare_into_the_place_of_one_that_died(home: Path) -> None:
    async def script(service: FakeService) -> None:
        await until_ready(service)
        assert (selected(service), spares(service)) == ([0, 1, 2], [3])
        dead, spare = at(service, 1), at(service, 3)
        spec = dead.spec
        published: list[list[int]] = []
        steer = service.backend.steer
        service.backend.steer = lambda members: (  # type: ignore[method-assign]
            steer(members),
            published.append(selected(service)),
        )
        end(dead)
        await until_ready(service)
        await rest()
        assert published[0] == [0, 2, 3]
        assert all(each == [0, 2, 3] for each in published), "the next spare is not selected"
        assert spare.spec is spec
        assert (dead.starts, spares(service)) == (2, [dead.slot])

    play(script, home)


def test_a_spare_serves_before_other_processes_of_the_worker_are_searched(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may take long, or wait for more that end."""
    found: list[list[int]] = []
    search = Ends._others

    async def script(service: FakeService) -> None:
        await until_ready(service)
        monkeypatch.setattr(
            Ends, "_others", lambda *args: (found.append(selected(service)), search(*args))[1]
        )
        end(at(service, 0), at(service, 1))
        await until_ready(service)

    play(script, home, spares=2)
    assert found[0] == [2, 3, 4]


def test_weights_and_cpus_are_those_of_the_place(home: Path) -> None:
    async def script(service: FakeService) -> None:
        await until_ready(service)
        before = {spec.number: spec for spec in service.plan.all_specs}
        end(at(service, 0))
        await until_ready(service)
        assert {worker.spec.number: worker.spec for worker in service.pool.workers} == before
        (member,) = (each for each in service.backend.members if each.slot == 2)
        assert (member.weight, member.cpu) == (5, before[0].cpu)

    play(script, home, workers=2, policy_name="cpu", weights=(5, 1))


def test_more_die_than_there_are_spares(home: Path) -> None:
    """The first that is ready again takes the place that is still empty."""

    async def script(service: FakeService) -> None:
        await until_ready(service)
        end(at(service, 0), at(service, 1))
        await until_ready(service)
        assert len(selected(service)) == 3
        assert len(spares(service)) == 1
        assert sorted(numbers(service.pool.workers)) == numbers_of(service)

    play(script, home)


def numbers_of(service: FakeService) -> list[int]:
    return [spec.number for spec in service.plan.all_specs]


def test_a_spare_that_dies_with_the_worker_does_not_take_its_place(home: Path) -> None:
    async def script(service: FakeService) -> None:
        await until_ready(service)
        end(at(service, 1), at(service, 3))
        await until_ready(service)
        assert len(selected(service)) == 3
        assert not {1, 3} & set(selected(service))
        assert len(spares(service)) == 1

    play(script, home)


def test_one_that_hung_and_is_back_is_a_spare(home: Path) -> None:
    async def script(service: FakeService) -> None:
        await until_ready(service)
        service.pool.report(at(service, 1), Event.STUCK)
        await rest()
        assert (selected(service), spares(service)) == ([0, 2, 3], [])
        service.pool.report(at(service, 1), Event.BACK)
        await rest()
        assert (selected(service), spares(service)) == ([0, 2, 3], [1])

    play(script, home)


def test_one_that_hangs_with_no_spare_gets_the_next(home: Path) -> None:
    async def script(service: FakeService) -> None:
        await until_ready(service)
        service.pool.report(at(service, 3), Event.STUCK)
        service.pool.report(at(service, 1), Event.STUCK)
        await rest()
        assert selected(service) == [0, 2]
        service.pool.report(at(service, 3), Event.BACK)
        await rest()
        assert (selected(service), at(service, 1).spec.is_spare) == ([0, 2, 3], True)

    play(script, home)


def test_a_drain_takes_no_spare_until_the_worker_has_ended(home: Path) -> None:
    """Who drains one may undo that; and others may die meanwhile."""

    async def script(service: FakeService) -> None:
        await until_ready(service)
        service.pool.report(at(service, 1), Event.DRAIN)
        await rest()
        assert (selected(service), spares(service)) == ([0, 2], [3])
        end(at(service, 1))
        await rest()
        assert selected(service) == [0, 2, 3]

    play(script, home)


def test_a_spare_is_retired_with_its_generation(home: Path) -> None:
    async def script(service: FakeService) -> None:
        await until_ready(service)
        await service.changes.renew(plan_for(3, spares=2), unreported)
        while len(service.pool.workers) > 5:
            await rest()
        assert selected(service) == [4, 5, 6]
        assert spares(service) == [7, 8]

    play(script, home)


def test_stopping_takes_no_spare(home: Path) -> None:
    async def script(service: FakeService) -> None:
        await until_ready(service)
        service.pool.stop(1.0, quick=False)
        await rest()
        assert not list(service.pool.workers)

    play(script, home)


def test_the_guard_gets_both(home: Path) -> None:
    """With what it has of them, the next controller knows who is a spare."""

    async def script(service: FakeService) -> None:
        await until_ready(service)
        service.pool.report(at(service, 1), Event.STUCK)
        await rest()
        entries = service.guard.entries
        kept = {
            slot: b'"is_spare":true' in entries[cast(Any, at(service, slot).process).key].value
            for slot in range(4)
        }
        assert kept == {0: False, 1: True, 2: False, 3: False}

    play(script, home)
