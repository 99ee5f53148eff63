"""The guard of an attacher: a process that gives the listeners back if the attacher is killed.

It is forked, so it shares the attacher's memory, and holds neither listeners nor steer's programs.
"""

from __future__ import annotations

import os
import signal
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable
from contextlib import suppress

from steer.errors import KernelError
from steer.linux import descriptors, fork, output, signals, title
from steer.linux.retry import Retry

_LAST_LINES_S = 1.0


class Guard:
    """The guard process of this process, which has a process group of its own.

    Args:
        name: of the service.
        restore: what the guard does once this process has ended, unless `end` was called; returns
            whether it succeeded.
        kept: the descriptors that `restore` needs.

    Raises:
        KernelError: it cannot be started.
    """

    def __init__(self, name: str, restore: Callable[[], bool], kept: Iterable[int]) -> None:
        self._name = name
        self._restore = restore
        self._kept = list(kept)
        self._start()

    def _start(self) -> None:
        attacher = os.pidfd_open(os.getpid())
        try:
            self.pid, self._pidfd = fork.fork(lambda: self._run(attacher), signals.OURS)
        except OSError as error:
            raise KernelError.from_oserror("start the guard", error) from None
        finally:
            os.close(attacher)

    def _run(self, attacher: int) -> int:
        """In the guard: wait for the end of the attacher. Returns the exit status."""
        # `killall steer` must not kill the guard along with the attacher.
        fork.rename("reuseport-guard")
        title.show(f"steer: guard {self._name}")
        descriptors.keep_only([attacher, *self._kept])
        output.stderr.reset()
        fork.wait_for_end(attacher, None)
        is_done = self._restore()
        output.stderr.finish(_LAST_LINES_S)
        return 0 if is_done else 1

    def fileno(self) -> int:
        """A pidfd of the guard: readable once it has ended. `renew` makes another one."""
        return self._pidfd

    def renew(self) -> None:
        """Replace the guard: it was killed, or has files open that it should not any more.

        Raises:
            KernelError: no other can be started; the present one is left as it is.
        """
        pid, pidfd = self.pid, self._pidfd
        self._start()
        _end(pid, pidfd)

    def end(self) -> None:
        """End the guard: nothing is left to give back. A second call does nothing."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            _end(self.pid, pidfd)


class WatchedGuard:
    """Has another guard started if one was killed."""

    def __init__(self, guard: Guard, loop: AbstractEventLoop, retry: Retry) -> None:
        self._guard = guard
        self._loop = loop
        self._retry = retry
        self._is_over = False

    def begin(self) -> None:
        self._loop.add_reader(self._guard.fileno(), self.renew)

    def renew(self) -> None:
        """Replace the guard now, or as soon as another can be started."""
        act = "start another guard"
        self._retry.until_done(act, self._renew, lambda: not self._is_over)

    def _renew(self) -> None:
        self._loop.remove_reader(self._guard.fileno())
        self._guard.renew()
        self.begin()

    def end(self) -> None:
        self._is_over = True
        self._loop.remove_reader(self._guard.fileno())


def _end(pid: int, pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    fork.reap(pid, pidfd, is_child=True)
    os.close(pidfd)
