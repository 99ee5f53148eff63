"""Finds and ends workers whose controller and guard were both killed.

The record beside the control socket names them (see `record`). If that was removed, they are found
by what their processes show: commands by their environment, Python callables by their titles. This
also finds processes of a worker whose first process has ended. Only this network and pid namespace
are searched, and workers of a service with a controller or guard are never taken for abandoned.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from steer.config import servers
from steer.config.address import Bind
from steer.control import claim, record
from steer.control.record import Worker
from steer.linux import family, processes
from steer.linux.family import Family
from steer.linux.services import Member
from steer.sockets import lifeline, port_checks

_LOOK_AGAIN_S = 0.05
_KILLED_S = 2.0


class Abandoned(msgspec.Struct, frozen=True):
    """A service without controller and guard.

    Args:
        control: path of its control socket; None: unknown.
        workers: at least one.
    """

    name: str
    control: Path | None
    workers: tuple[Worker, ...]


def find(controls: Iterable[Path], unattended: Iterable[Member]) -> list[Abandoned]:
    """All abandoned services that this user may end.

    Args:
        controls: paths of control sockets at which nobody answers.
        unattended: see `services`. They are needed for services without a record.
    """
    recorded = [Abandoned(path.stem, path, tuple(record.living(path))) for path in controls]
    known = {pid for each in recorded for pid, _ in each.workers}
    unrecorded: dict[str, list[Worker]] = {}
    for name, worker in _by_process(unattended, known):
        unrecorded.setdefault(name, []).append(worker)
    found = []
    for each in recorded:
        workers = (*each.workers, *unrecorded.pop(each.name, ()))
        if workers:
            found.append(Abandoned(each.name, each.control, workers))
    found += [Abandoned(name, None, tuple(them)) for name, them in unrecorded.items()]
    return found


def _by_process(
    unattended: Iterable[Member], known: Collection[int]
) -> Iterator[tuple[str, Worker]]:
    """The first process of each worker that is not known yet. If that has ended, the eldest of the
    others takes its place: it is expected to pass on the signal to finish."""
    members = {member.pid: member for member in unattended}
    firsts = {*known, *members}
    eldest = {}
    for member in members.values():
        if member.first in (None, member.pid) or member.first not in firsts:
            eldest[_eldest(member, members)] = member.name
    for pid in sorted(eldest.keys() - set(known)):
        shown = servers.ProcessInfo(processes.arguments(pid), processes.command(pid) or "")
        yield eldest[pid], (pid, servers.stop_signals_of([shown]).first)


def _eldest(member: Member, members: Mapping[int, Member]) -> int:
    """The farthest ancestor that claims to belong to the same worker. A process is believed only
    for itself, as anybody may claim anything."""
    above: Member | None = member
    while above is not None and (above.name, above.first) == (member.name, member.first):
        pid = above.pid
        above = members.get(processes.parent(pid) or 0)
    return pid


def end(service: Abandoned, within_s: float, remove_directory: bool) -> Sequence[int]:
    """Tell the workers to finish, then kill them and all of their processes.

    Args:
        within_s: how long they may take to finish.
        remove_directory: whether to remove the directory of the control socket if it is empty then.

    Returns:
        Processes that could not be ended.
    """
    ending = [_Ending(worker) for worker in service.workers]
    _until_gone(ending, within_s)
    for each in ending:
        each.kill()
    _until_gone(ending, _KILLED_S)
    left_over = [pid for each in ending for pid in each.left_over()]
    if not left_over and service.control is not None:
        claim.remove(service.control, claim.inode(service.control), remove_directory)
    return left_over


def _until_gone(ending: Iterable[_Ending], within_s: float) -> None:
    end_s = time.monotonic() + within_s
    # Ask each of them, as `is_gone` also tells its other processes to finish.
    while [each for each in ending if not each.is_gone()] and time.monotonic() < end_s:
        time.sleep(_LOOK_AGAIN_S)


class _Ending:
    """A worker that is told to finish: first its first process, then its other processes."""

    def __init__(self, worker: Worker) -> None:
        self._pid, self._number = worker
        self._began_ticks = processes.start_time_ticks(self._pid)
        self._told: set[int] = set()
        self._is_gone = False
        self._family = Family(self._pid, is_child=False)
        self._family.remember()
        if not lifeline.has_told(self._pid):
            with suppress(OSError):
                os.kill(self._pid, self._number)

    def is_gone(self) -> bool:
        """Whether no process is left. Processes that the first one left behind are told once to
        finish."""
        if not self._is_gone and not self._first_is_there():
            others = set(self._family.others())
            family.send(self._number, others - self._told)
            self._told |= others
            self._is_gone = not others
        return self._is_gone

    def kill(self) -> None:
        if self.is_gone():
            return
        if self._first_is_there():  # it need not lead a process group
            family.send(signal.SIGKILL, [self._pid])
        self._family.kill()

    def left_over(self) -> list[int]:
        first = [self._pid] if self._first_is_there() else []
        return [] if self._is_gone else [*first, *self._family.others()]

    def _first_is_there(self) -> bool:
        same = processes.start_time_ticks(self._pid) == self._began_ticks
        return same and processes.is_alive(self._pid)


def is_in_the_way(service: Abandoned, binds: Iterable[Bind]) -> bool:
    """Whether one of its processes listens at one of these addresses."""
    at = {holder.pid for bind in binds for holder in port_checks.holders(bind)}
    return any(at.intersection(processes.descendants(pid)) for pid, _ in service.workers)
