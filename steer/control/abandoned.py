"""Workers whose controller and guard were both killed: which they are, and their end.

They are in the record beside the control socket (see `record`). Where that is gone, as with its
directory, they are found by what their processes say: commands in their environment, Python
callables in their titles. So are processes of a worker whose first has ended. Of this network
and pid namespace only, and never where a controller or guard of that service is there.
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
    """What is left of a service.

    Args:
        control: path of its control socket; None where it is not known.
        workers: at least one.
    """

    name: str
    control: Path | None
    workers: tuple[Worker, ...]


def find(controls: Iterable[Path], unattended: Iterable[Member]) -> list[Abandoned]:
    """All there are that this user may end.

    Args:
        controls: paths of control sockets at which nobody answers.
        unattended: see `services`; those of which there is no record are found by them.
    """
    recorded = [Abandoned(path.stem, path, tuple(record.left(path))) for path in controls]
    known = {pid for each in recorded for pid, _ in each.workers}
    unrecorded: dict[str, list[Worker]] = {}
    for name, worker in _by_process(unattended, known):
        unrecorded.setdefault(name, []).append(worker)
    found = []
    for each in recorded:
        workers = (*each.workers, *unrecorded.pop(each.name, ()))
        if workers:
            found.append(Abandoned(each.name, each.control, workers))
    found += [Abandoned(name, None, tuple(left)) for name, left in unrecorded.items()]
    return found


def _by_process(
    unattended: Iterable[Member], known: Collection[int]
) -> Iterator[tuple[str, Worker]]:
    """The first process of each worker but those known; of one whose first has ended, the eldest
    of the others, which is to pass on that it is to finish, as the first would have."""
    members = {member.pid: member for member in unattended}
    firsts = {*known, *members}
    eldest = {}
    for member in members.values():
        if member.first in (None, member.pid) or member.first not in firsts:
            eldest[_eldest(member, members)] = member.name
    for pid in sorted(eldest.keys() - set(known)):
        shown = servers.Shown(processes.arguments(pid), processes.command(pid) or "")
        yield eldest[pid], (pid, servers.finish([shown]).first)


def _eldest(member: Member, members: Mapping[int, Member]) -> int:
    """The farthest of its ancestors that say they are of the same worker, too. What one says of
    another is not believed: anybody may say it."""
    above: Member | None = member
    while above is not None and (above.name, above.first) == (member.name, member.first):
        pid = above.pid
        above = members.get(processes.parent(pid) or 0)
    return pid


def end(left: Abandoned, within_s: float, remove_directory: bool) -> Sequence[int]:
    """Have the workers that are left finish, then kill them and all that belongs to them.

    Args:
        within_s: for those that are told to finish.
        remove_directory: whether that of the control socket may go, too, if it is empty then.

    Returns:
        Processes that are there even so.
    """
    ending = [_Ending(worker) for worker in left.workers]
    _until_gone(ending, within_s)
    for each in ending:
        each.kill()
    _until_gone(ending, _KILLED_S)
    there = [pid for each in ending for pid in each.there()]
    if not there and left.control is not None:
        claim.remove(left.control, claim.inode(left.control), remove_directory)
    return there


def _until_gone(ending: Iterable[_Ending], within_s: float) -> None:
    end_s = time.monotonic() + within_s
    # Each is asked, as that tells what it left behind: not only those up to one that lingers.
    while [each for each in ending if not each.is_gone()] and time.monotonic() < end_s:
        time.sleep(_LOOK_AGAIN_S)


class _Ending:
    """A worker that is told to finish: its first process, then what that leaves behind."""

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
        """Whether nobody is left of it. Those who are left behind are told to finish, once."""
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

    def there(self) -> list[int]:
        first = [self._pid] if self._first_is_there() else []
        return [] if self._is_gone else [*first, *self._family.others()]

    def _first_is_there(self) -> bool:
        same = processes.start_time_ticks(self._pid) == self._began_ticks
        return same and processes.is_alive(self._pid)


def is_in_the_way(left: Abandoned, binds: Iterable[Bind]) -> bool:
    """Whether one of its processes is at one of these addresses."""
    at = {holder.pid for bind in binds for holder in port_checks.holders(bind)}
    return any(at.intersection(processes.descendants(pid)) for pid, _ in left.workers)
