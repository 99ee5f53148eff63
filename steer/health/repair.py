"""Looking closely at one worker's sockets, and repairing those that left their groups.

`membership` decides what follows from what is seen. A look takes a hundred microseconds for each
socket.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from steer.backends import anchors
from steer.backends.membership import Cure, Departure, Sighting, Tries, cure, departure
from steer.config.address import Bind
from steer.errors import KernelError
from steer.health.survey import Survey
from steer.linux import port_holders
from steer.sockets import members
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import State
from steer.workers.pool import WorkerPool

if TYPE_CHECKING:
    from steer.workers.process import WorkerProcess

_AGAIN_S = 30.0
"""A replacement that has not come after this time is requested again."""
_NOTES_MAX = 32
_TAKES_ALL = (Departure.DISSOLVED, Departure.ON_DEVICE)
"""Departures after which a UDP socket gets all datagrams, if the kernel finds it before the
group."""


class _Socket(NamedTuple):
    """A worker's socket on one of its addresses.

    Args:
        known: what is known of its worker.
        at: the number of the bind.
        sock: a duplicate; None if it cannot be borrowed.
        is_held: whether the backend holds a duplicate.
        has: whether the worker has it open; None if that is not known.
    """

    worker: WorkerHandle
    process: WorkerProcess
    known: _Known
    at: int
    bind: Bind
    sock: socket.socket | None
    is_held: bool
    has: bool | None

    @property
    def inode(self) -> int:
        return self.process.bound[self.at]


class _Known(msgspec.Struct):
    """What is known of a worker's process; a new process of the worker starts with nothing known.

    Args:
        suspected: by bind, the number of the survey in which its socket seemed to be closed.
        told: the binds and departures that were logged.
        lends: whether the controller may borrow its sockets.
    """

    pid: int
    suspected: dict[int, int] = {}
    told: set[tuple[int, Departure]] = set()
    lends: bool = True


class Repair:
    """Looks at workers, and repairs their sockets.

    Args:
        survey: the latest.
        replace: requests a replacement for a worker, with new sockets.
    """

    def __init__(
        self, pool: WorkerPool, survey: Survey, replace: Callable[[WorkerHandle], None]
    ) -> None:
        self._pool = pool
        self._survey = survey
        self._replace = replace
        self._tries: dict[int, Tries] = {}
        self._known: dict[WorkerHandle, _Known] = {}

    def forget(self) -> None:
        """The configuration may have changed, and with it what workers do."""
        self._tries.clear()
        self._pool.group_notes.clear()

    def gone(self, worker: WorkerHandle) -> None:
        """The worker is gone."""
        self._known.pop(worker, None)

    def look_at(self, worker: WorkerHandle, process: WorkerProcess) -> None:
        """Look at the worker's sockets, and note whether another look is needed soon."""
        known = self._known.get(worker)
        if known is None or known.pid != process.pid:
            known = self._known[worker] = _Known(process.pid)
        with ExitStack() as stack:
            borrowed = self._borrow(process, known, stack)
            held = self._pool.backend.held(worker.slot)
            held_here = {at: stack.enter_context(_duplicate(fd)) for at, fd in enumerate(held)}
            for at, bind in enumerate(process.launch.binds[: len(process.bound)]):
                has = None if borrowed is None else at in borrowed
                sock = (borrowed or {}).get(at) or held_here.get(at)
                if worker.state is not State.STOPPING or at in worker.departures:
                    self._look_at_one(
                        _Socket(worker, process, known, at, bind, sock, at in held_here, has)
                    )
        if worker.departures or known.suspected:
            self._survey.odd.add(worker)
        else:
            self._survey.odd.discard(worker)

    def _look_at_one(self, one: _Socket) -> None:
        found = departure(one.bind.protocol, self._sight(one))
        if found is not Departure.CLOSED:
            one.known.suspected.pop(one.at, None)
        if found is None:
            self._is_in(one)
        elif found is not Departure.CLOSED or self._is_certain(one):
            self._mend(one, found, cure(found, self._splits(one)))

    def _mend(self, one: _Socket, found: Departure, how: Cure) -> None:
        self._warn(one, found, how)
        if how is Cure.SHARE and one.sock is not None:
            members.share(one.sock)
        elif how is Cure.REJOIN and one.sock is not None:
            one.worker.departures.pop(one.at, None)
            self._rejoin(one)
        else:
            self._is_out(one, found)
            if how is Cure.REPLACE and one.worker.is_settled:
                self._replace_if_due(one.worker)

    def _splits(self, one: _Socket) -> bool:
        """Whether a socket that is bound now may join a connected one instead of the group."""
        return anchors.is_at_risk(one.at, one.bind, self._pool.backend.anchors)

    def _is_certain(self, one: _Socket) -> bool:
        """Whether a socket that seems closed is. One survey does not prove it, as a worker that
        exits closes its sockets as well. And a process that is no descendant may have it open."""
        if one.known.suspected.setdefault(one.at, self._survey.number) == self._survey.number:
            return False
        return (
            one.at in one.worker.departures or not one.is_held or not self._is_open_elsewhere(one)
        )

    def _is_open_elsewhere(self, one: _Socket) -> bool:
        protocol: port_holders.Protocol = "udp" if one.bind.protocol == "udp" else "tcp"
        there = port_holders.holders(protocol, one.bind.address, one.bind.port)
        pids = {each.pid for each in there if each.inode == one.inode}
        return not pids <= self._pool.own_pids

    def _borrow(
        self, process: WorkerProcess, known: _Known, stack: ExitStack
    ) -> Mapping[int, socket.socket] | None:
        """The sockets that the worker has open, by bind; None if that is not known."""
        if not known.lends:
            return None
        try:
            return stack.enter_context(process.sockets())
        except KernelError as error:
            known.lends = error.errno not in (errno.EPERM, errno.ENOSYS)
            return None

    def _sight(self, one: _Socket) -> Sighting:
        if self._is_gone(one) or (one.is_held and one.has is False):
            return Sighting(is_open=False)
        is_member = self._pool.backend.is_member(one.worker.slot, one.at)
        shares = members.shares(one.sock) if one.sock else None
        here = (self._survey.table(one.bind) or {}).get(one.inode)
        if here is None:
            return Sighting(None, None, None, is_member, shares)
        is_unusual = self._survey.is_unusual(here.device)
        return Sighting(True, here.is_connected, is_unusual, is_member, shares)

    def _is_gone(self, one: _Socket) -> bool:
        """Whether no process has the socket open, or it does not listen."""
        there = self._survey.table(one.bind)
        return there is not None and one.inode not in there

    def _is_in(self, one: _Socket) -> None:
        if one.worker.departures.pop(one.at, None) is not None:
            self._rejoin(one)

    def _rejoin(self, one: _Socket) -> None:
        if one.sock is not None:
            self._pool.backend.rejoin(one.worker.slot, one.at, one.sock)

    def _is_out(self, one: _Socket, found: Departure) -> None:
        worker = one.worker
        if one.at not in worker.departures:
            # A listener on a device stays in its group, as do sockets that we have open, too.
            over_udp = one.bind.protocol == "udp" and found is not Departure.CLOSED
            if over_udp or self._is_gone(one):
                self._pool.backend.record_departure(worker.slot, one.at)
            worker.departures[one.at] = found
        may_take_all = one.bind.protocol == "udp" and found in _TAKES_ALL
        if may_take_all and one.sock is not None and self._others_are_in(one):
            members.cut_off(one.sock)

    def _others_are_in(self, one: _Socket) -> bool:
        """Whether another worker can get what this one no longer gets."""
        return any(
            each.is_in_service and one.at not in each.departures
            for each in self._pool.workers
            if each is not one.worker
        )

    def _warn(self, one: _Socket, found: Departure, how: Cure) -> None:
        """Log it, once for each process: a socket that was cut off is seen as connected later."""
        if (one.at, found) in one.known.told or one.at in one.worker.departures:
            return
        one.known.told.add((one.at, found))
        what = f"worker {one.worker.slot}'s socket on {one.bind.label} left the group"
        words = f"{what}: {found.value}; {how.value}"
        self._pool.log.warning("%s", words)
        notes = self._pool.group_notes
        if len(notes) >= _NOTES_MAX:
            del notes[next(iter(notes))]
        notes[f"{one.bind.label} {found.name}"] = words

    def _replace_if_due(self, worker: WorkerHandle) -> None:
        now_s = self._pool.clock.now_s()
        if now_s < worker.replace_not_before_s:
            return
        tries = self._tries.setdefault(worker.spec.number, Tries())
        if tries.begin(now_s):
            worker.replace_not_before_s = now_s + _AGAIN_S
            self._replace(worker)
        elif tries.are_over:
            self._give_up(worker)

    def _give_up(self, worker: WorkerHandle) -> None:
        worker.replace_not_before_s = float("inf")
        words = f"worker {worker.slot} is not replaced again for its sockets, as that did not help"
        self._pool.log.warning("%s", words)
        self._pool.group_notes[f"worker {worker.spec.number}"] = words


def _duplicate(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))
