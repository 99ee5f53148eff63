"""What the controller does while it only looks after workers: counted, with fakes and no kernel."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from steer.config import address
from steer.config.plan import Generation
from steer.health import groups, survey
from steer.health.checks import Health
from steer.health.groups import Groups
from steer.health.hangs import Hangs
from steer.health.repair import Repair
from steer.health.survey import Survey
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.sockets.sock_diag import Bound
from steer.workers.clock import Clock
from steer.workers.handle import WorkerHandle
from steer.workers.hang import History, Verdict
from steer.workers.lifecycle import State
from steer.workers.looks import Looks
from steer.workers.pool import WorkerPool
from steer.workers.queues import Queues
from testkit.fake_loop import Loop
from testkit.growth_fakes import Cost

HANG_S = 2.0
AGES_S = 40.0


class Handles(list[WorkerHandle]):
    """Attributes: passes: how often somebody went through them."""

    passes = 0

    def __iter__(self) -> Iterator[WorkerHandle]:
        self.passes += 1
        return super().__iter__()


class Service:
    """A service with so many workers that are ready, and a controller that looks after them.

    Attributes:
        did: how often each thing was done.
        open: connections by slot.
        queued: connections that wait, by inode.
        closed: sockets that are not open any more, by inode.
    """

    def __init__(self, number: int, protocol: str = "tcp", is_counted: bool = True) -> None:
        self.did: Counter[str] = Counter()
        self.open: dict[int, int] = {}
        self.came = 0
        self.queued: dict[int, int] = {}
        self.closed: set[int] = set()
        self.is_counted = is_counted
        self.loop = Loop()
        self.binds = [address.parse(f"{protocol}://127.0.0.1:80")]
        service = SimpleNamespace(hang_timeout=HANG_S, watchdog=None, hang="replace")
        plan: Any = SimpleNamespace(service=service, binds=self.binds, slots=number)
        self.generation = cast(Generation, SimpleNamespace(number=1, plan=plan))
        self.service: Any = service
        self.workers = Handles(self._worker(slot) for slot in range(number))
        self.clock = Clock(self.loop.read_s)
        self.retry = cast(Any, self)
        self.spare = SimpleNamespace(lent=nullcontext)
        self.looks = Looks(self.clock, self.retry)
        self.queues = Queues(self._dump, self.loop.read_s)
        self.backend = self.selection = self.migration = cast(Any, self)
        self.visibility = SimpleNamespace(forget=lambda: None)
        self.log = SimpleNamespace(warning=self._not_called, info=self._not_called)
        self.group_notes: dict[str, str] = {}
        self.anchors: dict[int, object] = {}
        self.name = "ebpf"
        self.shutdown = SimpleNamespace(has_begun=False)
        self.look_s = self.dump_s = 0.0
        self._last: dict[int, Bound] = {}
        pool = cast(WorkerPool, self)
        self.health = Health(pool, cast(Any, self.loop), lambda _: None, lambda: None)
        self.groups = Groups(pool, lambda _: None)
        self.clock.run(self.loop, self.looks.take)

    def _worker(self, slot: int) -> WorkerHandle:
        process = SimpleNamespace(
            pid=slot, bound=[slot], inodes=frozenset({slot}),
            launch=SimpleNamespace(binds=self.binds), sockets=self._not_called,
        )  # fmt: skip
        worker = WorkerHandle(
            cast(Any, SimpleNamespace(number=slot)), slot, self.generation, State.READY
        )
        worker.process = cast(Any, process)
        return worker

    def _not_called(self, *_: object) -> Any:
        raise AssertionError

    def _dump(self, *_: object) -> dict[int, Bound]:
        """The same object as long as nothing has changed."""
        self.did["dump"] += 1
        self.loop.take_s(self.dump_s)
        there = [each.slot for each in self.workers if each.slot not in self.closed]
        now = {slot: Bound(self.queued.get(slot, 0), 9) for slot in there}
        if now != self._last:
            self._last = now
        return self._last

    # As retry.

    def attempt(self, _act: str, do: Callable[[], object]) -> bool:
        do()
        return True

    def result(self, _act: str, do: Callable[[], Any], _otherwise: Any) -> Any:
        return do()

    # As the backend.

    write_waiting = None

    def busy(self) -> Any:
        return set(self.open) if self.is_counted else None

    def pulse(self) -> bytes | None:
        return self.traffic() if self.is_counted else None

    def traffic(self, *_: object) -> bytes:
        return str((self.came, self.open)).encode()

    def counts(self, _slot: int, _bind: int | None = None) -> None:
        self.did["counts"] += 1

    def attach_again(self) -> None:
        self.did["attach"] += 1


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Service]:
    def made(number: int, **keys: Any) -> Service:
        service = Service(number, **keys)
        monkeypatch.setattr(groups.traffic, "pulse", service.traffic)

        def look_at(_repair: Repair, worker: WorkerHandle, _worker: object) -> None:
            service.did["borrow"] += 1
            service.loop.take_s(service.look_s)
            service.did[f"borrow {worker.slot}"] += 1

        def judge(found: Hangs, worker: WorkerHandle, process: Any) -> Verdict:
            service.did["judge"] += 1
            found._histories[process.pid] = History(HANG_S)
            worker.queued = sum(each.queued for each in service.queues.of(process).values())
            return Verdict.FINE

        monkeypatch.setattr(Repair, "look_at", look_at)
        monkeypatch.setattr(Hangs, "_judge", judge)
        monkeypatch.setattr(groups.Programs, "look", lambda *_: service.did.update(["programs"]))
        # Until everybody was looked at once.
        service.loop.run_s(5.0 + number / groups._AT_ONCE)
        service.did.clear()
        service.loop.steps_s.clear()
        return service

    return made


@pytest.mark.parametrize("number", [10, 1000])
def test_at_rest_it_wakes_once_a_second_and_does_next_to_nothing(
    make: Callable[..., Service], number: int
) -> None:
    service = make(number)
    service.loop.run_s(AGES_S)
    assert len(service.loop.steps_s) <= AGES_S + 1
    assert service.did["judge"] == service.did["programs"] == service.did["counts"] == 0
    # The kernel tells of no more sockets in a second than a small service has.
    looks = 2 + AGES_S / max(1.0, number / survey.PER_S)
    assert service.did["dump"] <= looks
    assert service.did["borrow"] <= AGES_S / groups._RESTS
    assert service.did["attach"] <= AGES_S / 4


@pytest.mark.parametrize("number", [10, 1000])
def test_one_busy_worker_is_the_only_one_looked_at(
    make: Callable[..., Service], number: int
) -> None:
    service = make(number)
    service.open[3] = 1
    service.loop.run_s(AGES_S)
    ticks = AGES_S / (HANG_S / 4)
    assert ticks - 4 <= service.did["judge"] <= ticks + 1
    assert service.did["dump"] <= ticks + AGES_S
    assert len(service.loop.steps_s) <= 2 * ticks + number


def test_what_waits_is_looked_at_more_often(make: Callable[..., Service]) -> None:
    service = make(10)
    service.open[3] = service.queued[3] = 1
    service.loop.run_s(1.0)
    service.did.clear()
    service.loop.run_s(HANG_S)
    assert service.did["judge"] >= 14


@pytest.mark.parametrize("number", [10, 1000])
def test_what_waits_and_is_not_counted_is_seen_all_the_same(
    make: Callable[..., Service], number: int
) -> None:
    service = make(number)
    service.queued[number - 1] = 1
    service.loop.run_s(2.0 + number / survey.PER_S)
    assert service.did["judge"] > 0


def test_at_rest_each_is_looked_at_in_its_turn(make: Callable[..., Service]) -> None:
    service = make(10)
    service.loop.run_s(20.0 * groups._RESTS)
    assert {service.did[f"borrow {slot}"] for slot in range(10)} == {2}


NOT_COUNTED = [{"is_counted": False}, {"protocol": "udp", "is_counted": False}]


@pytest.mark.parametrize("keys", NOT_COUNTED)
def test_where_nobody_counts_one_answer_is_for_all(make: Callable[..., Service], keys: Any) -> None:
    service = make(1000, **keys)
    service.loop.run_s(AGES_S)
    assert service.did["judge"] == 0
    assert service.did["dump"] <= AGES_S + 1
    assert service.did["borrow"] <= AGES_S + 1
    service.queued[7] = 1
    service.loop.run_s(2.0)
    assert service.did["judge"] > 0


@pytest.mark.parametrize("keys", NOT_COUNTED)
@pytest.mark.parametrize("is_taken", [True, False])
def test_where_nobody_counts_all_are_looked_at_when_something_comes(
    make: Callable[..., Service], keys: Any, is_taken: bool
) -> None:
    """It is taken before anybody looks, and only the kernel has counted it; or it waits."""
    service = make(100, **keys)
    service.came += is_taken
    service.queued[7] = not is_taken
    service.loop.run_s(3.0)
    assert len({key for key in service.did if key.startswith("borrow ")}) == 100


def test_when_something_comes_all_are_looked_at_once_and_no_more(
    make: Callable[..., Service],
) -> None:
    service = make(200)
    service.came += 1
    service.loop.run_s(1.0 + 200 / groups._MOST + 1.0)
    seen = {key for key in service.did if key.startswith("borrow ")}
    assert len(seen) == 200
    before = service.did["borrow"]
    assert before <= 200 + groups._AT_ONCE + 2
    service.loop.run_s(10.0)
    assert service.did["borrow"] - before <= 12


def test_no_step_is_long_where_looks_are(make: Callable[..., Service]) -> None:
    service = make(200)
    service.look_s = groups._LOOKING_S / 2
    service.came += 1
    service.loop.run_s(1.5)
    steps = len(service.loop.steps_s)
    assert 0 < service.did["borrow"] <= 2 * steps
    service.loop.run_s(30.0)
    assert len({key for key in service.did if key.startswith("borrow ")}) == 200


def test_no_closer_look_is_in_the_step_of_a_survey_that_took_long(
    make: Callable[..., Service],
) -> None:
    service = make(200)
    service.look_s, service.dump_s = groups._LOOKING_S, 2 * groups._LOOKING_S
    service.came += 1
    service.loop.run_s(30.0)
    assert len({key for key in service.did if key.startswith("borrow ")}) == 200
    assert max(service.loop.steps_s) < service.dump_s + service.look_s


def test_a_survey_goes_through_many_workers_quickly(make: Callable[..., Service]) -> None:
    """As each second some of them change while a thousand are replaced."""
    service = make(1000)
    service.groups.changed(service.workers[0])
    with (cost := Cost()).of_steps():
        service.groups._survey.take(True)
        while not service.groups._survey.is_compared:
            service.groups._survey.compare()
    assert cost["steps"] < 60 * 1000


def test_who_stands_otherwise_is_found_in_steps(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While others are forked it takes long to go through all."""
    service = make(200)
    seen_s = 0.001

    def is_odd(_survey: Survey, worker: WorkerHandle) -> bool:
        service.loop.take_s(seen_s)
        return worker.slot == 3

    monkeypatch.setattr(Survey, "_is_odd", is_odd)
    monkeypatch.setattr(Survey, "_usual", lambda _: set())
    service.groups.changed(service.workers[0])
    service.loop.run_s(2.0)
    assert service.did["borrow 3"]
    assert max(service.loop.steps_s) < survey._STEP_S + 2 * seen_s


def test_looks_that_take_long_have_turns_of_their_own() -> None:
    loop = Loop()
    clock = Clock(loop.read_s)
    looks = Looks(clock, Retry(Log("error", "text"), Spare(0)))
    taken: Counter[int] = Counter()

    def look(number: int) -> float:
        taken[number] += 1
        loop.take_s(0.004)
        return 0.0 if number == 0 else 1.0

    for number in range(6):
        looks.add(str(number), partial(look, number), 1.0)
    clock.run(loop, looks.take)
    loop.run_s(10.0)
    assert max(loop.steps_s) < 0.01
    assert {taken[number] for number in range(1, 6)} <= {9, 10}, "one that is always due is no bar"


@pytest.mark.parametrize("number", [10, 1000])
def test_one_whose_socket_is_gone_is_the_only_one_looked_at(
    make: Callable[..., Service], number: int
) -> None:
    service = make(number)
    service.closed.add(3)
    service.loop.run_s(1.05 * max(survey.LOOK_S, number / survey.PER_S))
    assert service.did["borrow 3"]
    assert service.did["borrow"] <= service.did["borrow 3"] + 2


def test_one_that_comes_with_its_socket_closed_is_looked_at(make: Callable[..., Service]) -> None:
    """What the kernel says has not changed since, but then it was not ready."""
    service = make(10)
    worker = service.workers[3]
    worker.state = State.STARTING
    service.closed.add(3)
    service.loop.run_s(3.0)
    assert not service.did["borrow 3"]
    worker.state = State.READY
    service.groups.changed(worker)
    service.loop.run_s(1.05)
    assert service.did["borrow 3"]


def test_workers_that_come_and_go_are_not_looked_at_closer(make: Callable[..., Service]) -> None:
    """All their sockets are seen together. One thousand may come at once."""
    service = make(1000)
    for worker in service.workers:
        service.groups.changed(worker)
        service.loop.run_s(0.01)
    assert service.did["borrow"] <= 10 / groups._RESTS + 1
    assert service.did["dump"] <= 10 + 10 / 4 + 1


def test_who_starts_after_something_came_is_not_looked_at_for_it(
    make: Callable[..., Service],
) -> None:
    service = make(1000)
    for worker in service.workers[10:]:
        worker.state = State.STARTING
    service.came += 1
    service.loop.run_s(1.1)
    for worker in service.workers[10:]:
        worker.state = State.READY
    service.loop.run_s(10.0)
    assert {f"borrow {slot}" for slot in range(10)} <= service.did.keys()
    assert service.did["borrow"] <= 10 + 11 / groups._RESTS + 1


def test_what_a_look_costs_does_not_depend_on_how_many_there_are(
    make: Callable[..., Service],
) -> None:
    """To go through all takes the longer the more there are: it is done some times a second."""
    service = make(1000)
    for _ in range(8):
        service.came += 1
        service.workers.passes = 0
        service.loop.run_s(1.0)
        assert service.did["borrow"] >= groups._MOST / 2
        assert service.workers.passes <= 5
        service.did.clear()


def test_one_that_triggers_its_watchdog_is_looked_at(make: Callable[..., Service]) -> None:
    service = make(10)
    worker = service.workers[3]
    worker.store_notification({"WATCHDOG": "trigger"}, 0.0)
    seen: list[int] = []
    service.health._hangs._set_hung = (  # type: ignore[method-assign]
        lambda worker, *_: seen.append(worker.slot)
    )
    service.health.changed(worker)
    service.loop.run_s(1.0)
    assert seen
    assert set(seen) == {3}


def test_nothing_is_kept_of_workers_that_are_gone(make: Callable[..., Service]) -> None:
    """A thousand that a reload replaces take megabytes."""
    service = make(100)
    service.loop.run_s(10.0)
    for worker in list(service.workers):
        worker.state = State.GONE
        service.groups.changed(worker)
        service.workers.remove(worker)
    del worker
    gc.collect()
    there = [each for each in gc.get_objects() if isinstance(each, WorkerHandle)]
    assert [each.slot for each in there if each.generation is service.generation] == []
