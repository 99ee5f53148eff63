"""Old workers drain a few at a time: what that costs, and that nobody waits for it. No kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steer.config import address
from steer.workers import drain, queues, remains
from steer.workers.drain import Drain, Drainer
from steer.workers.lifecycle import Event
from steer.workers.queues import Queues, Table
from steer.workers.remains import Remains
from testkit.fake_loop import Loop
from testkit.growth_fakes import FakeService, cost_of

BINDS = [address.parse("127.0.0.1:80")]
LOOK_S = 0.0002
"""A look at the files of a worker."""
DUMP_S = 0.001
PROGRAMS_S = 0.02


class Workers:
    """A pool of old workers, whose places say what they have.

    Attributes:
        did: how often each thing was done.
        queued: connections that wait, by inode.
    """

    def __init__(self, number: int) -> None:
        self.loop = Loop()
        self.did = dict.fromkeys(("settle", "dump", "files", "move"), 0)
        self.reported: list[tuple[int, Event]] = []
        self.failed: list[str] = []
        self.queued: dict[int, int] = {}
        self.holds: set[int] = set()
        self.settled_s = self.loop.now_s + PROGRAMS_S
        self.clock = SimpleNamespace(now_s=self.loop.read_s)
        self.queues = Queues(self._dump, self.loop.read_s)
        self.retry = SimpleNamespace(
            spare=SimpleNamespace(lent=self._lent),
            failed=lambda act, error: self.failed.append(f"{act}: {error}"),
        )
        self.backend = SimpleNamespace(forget_flows=None, open=lambda slot: slot in self.holds)
        self.workers = [self._worker(slot) for slot in range(number)]

    def _worker(self, slot: int) -> Any:
        launch = SimpleNamespace(binds=BINDS, service=SimpleNamespace(adopts=False))
        process = SimpleNamespace(pid=slot, bound=[slot], launch=launch)
        return SimpleNamespace(
            slot=slot, process=process, serves=False, was_hung=False, initial_sockets=set(),
            closed_its_listeners=False,
        )  # fmt: skip

    @contextmanager
    def _lent(self) -> Iterator[None]:
        yield

    def _dump(self, *_: object) -> Any:
        self.did["dump"] += 1
        self.loop.take_s(DUMP_S)
        inodes = range(len(self.workers))
        return {each: SimpleNamespace(queued=self.queued.get(each, 0)) for each in inodes}

    def open_sockets(self, _pid: int) -> set[int]:
        self.did["files"] += 1
        self.loop.take_s(LOOK_S)
        return set()

    def next_publication(self) -> int:
        return 1

    def is_synchronized(self, _publication: int) -> bool:
        self.did["settle"] += 1
        return self.loop.now_s >= self.settled_s

    def when_synchronized(self, _act: str, do: Callable[[], object], _publication: int) -> None:
        self.loop.call_later(max(0.0, self.settled_s - self.loop.now_s), do)

    def report(self, worker: Any, event: Event) -> None:
        self.reported.append((worker.slot, event))

    def migrate(self, worker: Any) -> None:
        self.did["move"] += 1
        self.queued.pop(worker.slot, None)
        self.queues.forget()

    def retire(self) -> list[Drain]:
        """All at once, as a reload does."""
        drainer = self.drainer()
        return [drainer.begin(worker) for worker in self.workers]

    def drainer(self) -> Drainer:
        parts: Any = self
        remains = Remains(parts, self.queues, parts, parts.clock, parts.retry)
        return Drainer(
            self.loop,
            remains,
            parts,
            parts.clock,
            parts.retry,
            self.report,
            lambda: 30.0,
            self.loop.read_s,
        )

    def run_until_settled(self) -> float:
        """How long it takes."""
        began_s = self.loop.now_s
        while len(self.reported) < len(self.workers):
            self.loop.run_s(0.01)
        return self.loop.now_s - began_s


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Workers]:
    def made(number: int) -> Workers:
        workers = Workers(number)
        monkeypatch.setattr(remains.processes, "open_sockets", workers.open_sockets)
        return workers

    return made


@pytest.mark.parametrize("number", [10, 1000])
def test_each_is_looked_at_once_and_no_step_is_long(
    make: Callable[[int], Workers], number: int
) -> None:
    workers = make(number)
    workers.retire()
    took_s = workers.run_until_settled()
    assert sorted(workers.reported) == [(slot, Event.DRAINED) for slot in range(number)]
    assert workers.did["files"] == number
    assert workers.did["move"] == 0
    assert max(workers.loop.steps_s) < drain._FIRST_TURN_S + LOOK_S + DUMP_S + 1e-6
    # The kernel is asked for all of them together.
    assert workers.did["dump"] <= 2 + took_s / queues._FRESH_S
    assert workers.did["settle"] <= 10 * number
    # Nobody waits but for looks.
    looks_s = number * LOOK_S + workers.did["dump"] * DUMP_S
    assert took_s < PROGRAMS_S + looks_s + 0.011


@pytest.mark.parametrize("number", [10, 1000])
def test_those_that_do_not_end_cost_little(make: Callable[[int], Workers], number: int) -> None:
    """Until they do, it is seen that nothing comes to wait for them: one question for all."""
    workers = make(number)
    workers.retire()
    workers.run_until_settled()
    workers.loop.run_s(10.0)
    before = dict(workers.did)
    workers.loop.run_s(5.0)
    assert workers.did["files"] == before["files"]
    assert workers.did["move"] == 0
    assert workers.did["dump"] - before["dump"] <= 5 / drain._REST_S
    workers.queued[3] = 1
    workers.loop.run_s(2 * drain._SELDOM_S)
    assert workers.did["move"] == 1


def test_whoever_asks_meanwhile_waits_for_one_turn(make: Callable[[int], Workers]) -> None:
    workers = make(1000)
    workers.retire()
    waits_s: list[float] = []

    def ask(due_s: float) -> None:
        waits_s.append(workers.loop.now_s - due_s)
        if len(waits_s) < 20:
            due_s = workers.loop.now_s
            workers.loop.call_later(0.0, lambda: ask(due_s))

    workers.loop.call_later(0.0, lambda: ask(1000.0))
    workers.run_until_settled()
    assert len(waits_s) == 20
    assert sum(waits_s) < 3 * drain._TURN_S


def test_one_with_a_queue_may_take_it_before_that_is_moved(make: Callable[[int], Workers]) -> None:
    workers = make(10)
    workers.queued[3] = 5
    workers.retire()
    workers.loop.run_s(remains.TAKE_S / 2)
    assert workers.did["move"] == 0
    assert len(workers.reported) == 9
    workers.run_until_settled()
    assert workers.did["move"] == 1


def test_one_with_connections_has_time_to_answer_them(make: Callable[[int], Workers]) -> None:
    workers = make(10)
    workers.holds.add(3)
    workers.retire()
    workers.loop.run_s(drain._LINGER_S - 0.05)
    assert 3 not in [slot for slot, _ in workers.reported]
    workers.loop.run_s(0.2)
    assert 3 in [slot for slot, _ in workers.reported]


def test_who_begins_later_does_not_wait_for_those_who_linger(
    make: Callable[[int], Workers],
) -> None:
    workers = make(10)
    late = workers.workers.pop()
    drainer = workers.drainer()
    for worker in workers.workers:
        drainer.begin(worker)
    workers.loop.run_s(30.0)
    drainer.begin(late)
    workers.loop.run_s(drain._REST_S)
    assert workers.reported[-1] == (late.slot, Event.DRAINED)


def test_one_that_is_called_off_or_has_ended_is_looked_at_no_more(
    make: Callable[[int], Workers],
) -> None:
    workers = make(3)
    drains = workers.retire()
    drains[0].cancel()
    workers.workers[1].process = None
    workers.loop.run_s(5.0)
    assert workers.reported == [(2, Event.DRAINED)]


def test_what_fails_is_tried_again(make: Callable[[int], Workers]) -> None:
    workers = make(3)
    refusals = iter([KeyError("once")])

    class Refusing(SimpleNamespace):
        @property
        def forget_flows(self) -> None:
            for each in refusals:
                raise each

    workers.backend = Refusing(open=workers.backend.open)
    workers.retire()
    workers.loop.run_s(5.0)
    assert sorted(workers.reported) == [(slot, Event.DRAINED) for slot in range(3)]
    assert len(workers.failed) == 1


def test_after_a_queue_was_moved_the_kernel_is_asked_anew(tmp_path: Path) -> None:
    async def script(service: FakeService) -> None:
        (worker,) = service.ready(1)
        asked: list[str] = []

        def ask(protocol: str, _family: int, _port: int) -> Table:
            asked.append(protocol)
            return {}

        service.pool.queues.__init__(ask, lambda: 100.0)  # type: ignore[misc]
        for _ in range(2):
            service.pool.queues.at(service.plan.binds[0])
        service.pool.migration.migrate(worker)
        service.pool.queues.at(service.plan.binds[0])
        assert len(asked) == 2

    cost_of(script, tmp_path, 1)
