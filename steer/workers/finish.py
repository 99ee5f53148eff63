"""How a worker's processes are told to finish, by what its command has become.

A command need not start its server by name: env(1) and nice(1) execute it in their place, init
wrappers and shells start it as their child. Which it is shows once it runs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

from steer.config import servers
from steer.config.servers import DEFAULT_STOP_SIGNALS, ProcessInfo, StopSignals
from steer.config.service import Service
from steer.linux import family, fork, processes
from steer.linux.family import Family

_MOST_WRAPPERS = 8


class Finishing:
    """Tells the processes of one worker to finish.

    Args:
        pidfd: of the first process.
        told_to_finish: another controller has told it.

    Attributes:
        told_to_finish: whether it was told.
    """

    def __init__(
        self, service: Service, family: Family, pidfd: int, told_to_finish: bool = False
    ) -> None:
        self.told_to_finish = told_to_finish
        self._service = service
        self._family = family
        self._pidfd = pidfd
        self._is_quick = False
        self._how: StopSignals | None = None

    def tell(self, quick: bool) -> None:
        """Tell the first process; once, as some servers that are asked again drop what they have.

        Args:
            quick: it need not finish: by SIGTERM, on which a server that finishes on another
                signal ends at once; also where it was told to finish before.
        """
        repeats = quick and not self._is_quick and self.how().others != signal.SIGTERM
        if not self.told_to_finish or repeats:
            self.told_to_finish, self._is_quick = True, quick
            try:
                self._family.remember()
            finally:
                fork.terminate(self._pidfd, self._told_by.first)

    def tell_others(self, pids: Iterable[int]) -> None:
        """Tell these of its processes, as the first has ended."""
        family.send(self._told_by.others, pids)

    @property
    def why_this_signal(self) -> str:
        """By which signal it was told, and why, where what it runs decided that; else ""."""
        return self._told_by.why

    @property
    def _told_by(self) -> StopSignals:
        return DEFAULT_STOP_SIGNALS if self._is_quick else self.how()

    def how(self, look: bool = True) -> StopSignals:
        """How it is told. What is known stays so: of a process that has ended it cannot be seen
        any more. But what a command has become may show only later.

        Args:
            look: whether it may have become something else.
        """
        may_change = self._how == DEFAULT_STOP_SIGNALS and bool(self._service.command)
        if self._how is None or (look and may_change):
            self._how = how(self._service, self._family.pid)
        return self._how


def how(service: Service, pid: int) -> StopSignals:
    """How to tell a worker to finish, by what the service says, or else by who is there now.

    Args:
        pid: of the worker's first process.
    """
    if service.stop_signal is not None or servers.known(service.command[:1]) is not None:
        return StopSignals(service.finish_signal, service.finish_signal)
    if not service.command:
        return servers.DEFAULT_STOP_SIGNALS
    return servers.stop_signals_of(_line(pid))


def _line(pid: int) -> Iterator[ProcessInfo]:
    """The first process, then its only child, and so on."""
    member: int | None = pid
    for _ in range(_MOST_WRAPPERS):
        if member is None:
            return
        yield ProcessInfo(processes.arguments(member), processes.command(member) or "")
        member = processes.only_child(member)
