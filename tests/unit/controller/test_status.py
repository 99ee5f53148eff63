"""What a report of the status asks for, and how often, with fakes."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from steer.backends.base import Counts, PolicyValues
from steer.config import address
from steer.control import schema
from steer.controller import status
from steer.errors import KernelError
from steer.sockets.sock_diag import Bound
from steer.workers.handle import WorkerHandles
from steer.workers.lifecycle import State
from steer.workers.queues import Queues

QUICK = schema.LoopDelay([], 0, 0.0, 0.0, 0.0, 0.0)


BOUND = [address.parse("127.0.0.1:80"), address.parse("udp://127.0.0.1:80")]


class FakeHandle(SimpleNamespace):
    __eq__, __hash__ = object.__eq__, object.__hash__


class FakeService:
    """With so many workers, none of which is real; counts what is asked of whom.

    Args:
        refuses: whether netlink and borrowing are refused.
    """

    def __init__(self, workers: int, refuses: bool = False) -> None:
        self.asked = Counter[str]()
        self.refuses = refuses
        self.plan: Any = SimpleNamespace(
            name="web",
            policy=SimpleNamespace(name="hash", declared=SimpleNamespace(histograms=())),
            service=SimpleNamespace(policy="hash", spares=0),
            spare_specs=(),
            policy_reason=None,
            binds=(),
            backends=(SimpleNamespace(reason=None),),
        )
        self.started_s = 0.0
        self.templates: Any = None
        self.backend: Any = SimpleNamespace(
            name="ebpf",
            notes=(),
            anchors={},
            policy_values=PolicyValues,
            counts=self._counts,
            open=self._open,
            unsteered=lambda: 0,
        )
        self.pool: Any = SimpleNamespace(
            workers=WorkerHandles(),
            generation=SimpleNamespace(number=1),
            visibility=SimpleNamespace(notes={}),
            group_notes={},
            queues=Queues(self._queues),
            selection=SimpleNamespace(retired=Counts(1000)),
            retry=SimpleNamespace(spare=SimpleNamespace(lent=self._lent)),
        )
        self.is_lent = False
        for slot in range(workers):
            self.pool.workers.add(self.worker(slot))

    def worker(self, slot: int) -> Any:
        process = SimpleNamespace(
            pid=slot + 10,
            started_s=0.0,
            inodes=frozenset((2 * slot, 2 * slot + 1)),
            bound=(2 * slot, 2 * slot + 1),
            launch=SimpleNamespace(binds=BOUND),
            sockets=self._sockets,
        )
        return FakeHandle(
            slot=slot,
            process=process,
            state=State.READY,
            held=False,
            leaving=False,
            is_ready_spare=False,
            is_hung=False,
            at_capacity=False,
            generation=SimpleNamespace(number=1, plan=SimpleNamespace(binds=BOUND)),
            spec=SimpleNamespace(cpus=(0,), weight=1),
            starts=1,
            status_text="",
            departures={},
        )

    def _counts(self, slot: int) -> Counts:
        self.asked["counts"] += 1
        return Counts(slot)

    def _open(self, _slot: int) -> int:
        return 0

    @contextmanager
    def _lent(self) -> Iterator[None]:
        self.is_lent = True
        yield
        self.is_lent = False

    def _queues(self, protocol: str, _family: int, _port: int) -> dict[int, Bound]:
        assert self.is_lent, "it takes a descriptor, and there may be none but the spare ones"
        self.asked["dumps"] += 1
        if self.refuses:
            raise KernelError("ask", "EPERM", errno=errno.EPERM)
        return {inode: Bound(inode, 9) for inode in range(protocol == "udp", 2000, 2)}

    def _sockets(self) -> Any:
        assert self.is_lent, "it takes descriptors, and there may be none but the spare ones"
        self.asked["borrowed"] += 1
        raise KernelError("borrow", "EPERM", errno=errno.EPERM)

    def report(self, meanwhile: Any = None) -> report.Service:
        """Args:
        meanwhile: is called in each turn of the loop.
        """

        async def together() -> schema.Service:
            told = status.report_of(self, "running", QUICK, {})
            task = asyncio.ensure_future(told)
            while not task.done():
                await asyncio.sleep(0)
                assert not self.is_lent, "others would take them"
                self.asked["turns"] += 1
                if meanwhile:
                    meanwhile()
            return await task

        return asyncio.run(together())


@pytest.mark.parametrize("workers", [10, 1000])
def test_a_report_asks_for_each_worker_once_and_for_queues_by_port(workers: int) -> None:
    service = FakeService(workers)
    told = service.report()
    turns = service.asked.pop("turns")
    assert service.asked == {"counts": workers, "dumps": 2}
    assert turns >= workers / 50, "the loop is kept from all else"
    assert [each.connections.queued for each in told.workers[:3]] == [0, 2, 4]
    assert [each.connections.queued_bytes for each in told.workers[:3]] == [1, 3, 5]
    assert told.totals.selected == 1000 + sum(range(workers))


def test_what_cannot_be_seen_is_left_out_and_asked_for_once() -> None:
    service = FakeService(3, refuses=True)
    told = service.report()
    assert {each.connections.queued for each in told.workers} == {None}
    assert service.asked["dumps"] == 1
    assert service.asked["borrowed"] == 3


def test_workers_that_go_meanwhile_are_counted_once() -> None:
    service = FakeService(200)
    pool = service.pool

    def goes() -> None:
        gone = [each for each in pool.workers if each.slot < 1000][:10]
        for each in gone:
            pool.workers.remove(each)
            pool.selection.retired += Counts(each.slot)
            pool.workers.add(service.worker(1000 + each.slot))

    told = service.report(goes)
    slots = [each.slot for each in told.workers]
    assert len(slots) == len(set(slots))
    assert max(slots) < 1000
    assert told.totals.selected == 1000 + sum(range(200))


def test_a_report_is_of_one_backend() -> None:
    service = FakeService(200)
    before = service.backend

    def moves() -> None:
        if service.backend is before:
            service.backend = SimpleNamespace(**{**vars(before), "name": "kernel"})

    told = service.report(moves)
    assert told.backend == "kernel"
    assert [each.slot for each in told.workers] == list(range(200))
    assert service.asked["counts"] > 200
