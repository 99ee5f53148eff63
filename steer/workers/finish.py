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
        pidfd: refers to the first process.
        told_to_finish: whether an earlier controller has told the worker to finish.

    Attributes:
        told_to_finish: whether the worker was told to finish.
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
        """Send the first process its stop signal, only once: some servers drop open requests at a
        second signal.

        Args:
            quick: send SIGTERM, on which a server whose stop signal is another one ends at once.
                It is sent even if the stop signal was sent before.
        """
        repeats = quick and not self._is_quick and self.how().others != signal.SIGTERM
        if not self.told_to_finish or repeats:
            self.told_to_finish, self._is_quick = True, quick
            try:
                self._family.remember()
            finally:
                fork.terminate(self._pidfd, self._signals.first)

    def signal_others(self, pids: Iterable[int]) -> None:
        """Send the stop signal to other processes of the worker, as the first one has ended."""
        family.send(self._signals.others, pids)

    @property
    def why_this_signal(self) -> str:
        """Which stop signal was sent, and why, if the program that the worker runs decided that;
        else ""."""
        return self._signals.why

    @property
    def _signals(self) -> StopSignals:
        return DEFAULT_STOP_SIGNALS if self._is_quick else self.how()

    def how(self, look: bool = True) -> StopSignals:
        """The stop signals of the worker. They are remembered, as the program of a process that has
        ended cannot be found any more.

        Args:
            look: whether to look again at a command that was no known server before: it may have
                executed one since.
        """
        may_change = self._how == DEFAULT_STOP_SIGNALS and bool(self._service.command)
        if self._how is None or (look and may_change):
            self._how = how(self._service, self._family.pid)
        return self._how


def how(service: Service, pid: int) -> StopSignals:
    """The stop signals of a worker: those of the configuration, or else those of the server that
    runs now.

    Args:
        pid: the worker's first process.
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
