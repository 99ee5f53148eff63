"""The guard process, as its parent sees it: forked, told, ended."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress

from steer.guard import standby
from steer.guard.channel import Channel, Frame
from steer.guard.store import PATIENCE_S, Settings, Traces
from steer.linux import fork


class GuardProcess:
    """There is none before `start`. Should it be killed nothing here fails, and what it is told
    is lost: see `is_told`.

    Args:
        control: the listening control socket. The process has a duplicate.
        say: how it logs; must not wait.
        predecessor: the channel to the guard process that still has all that this one is told.

    Attributes:
        pid: of the process.
    """

    def __init__(
        self, control: socket.socket, say: standby.Say, predecessor: socket.socket | None
    ) -> None:
        self.pid: int
        self.predecessor = predecessor
        self._control = control
        self._say = say
        self._channel: Channel | None = None
        self._pidfd = -1

    def start(self, settings: Settings, inode: int | None) -> None:
        """Fork it.

        Args:
            inode: of the control socket's path.

        Raises:
            OSError: no more processes, or no more files; see `process.fork_error`.
        """
        traces, predecessor = Traces(os.getpid(), inode), self.predecessor
        ours, theirs = socket.socketpair()

        def guard() -> int:
            return standby.main(traces, theirs, self._control, settings, self._say, predecessor)

        try:
            self.pid, self._pidfd = fork.fork(guard, standby.IGNORED)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(PATIENCE_S)
        self._channel = Channel(ours)

    def fileno(self) -> int:
        """A pidfd of it, readable once it has ended; -1 before `start`."""
        return self._pidfd

    @property
    def has_ended(self) -> bool:
        """Whether `fileno()` is readable."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def is_told(self) -> bool:
        """Whether it takes what it is told, as far as we know."""
        return self._channel is not None

    def tell(self, frames: Sequence[Frame], fds: Sequence[int] = ()) -> None:
        """Raises OSError: EBADF, a descriptor is not open."""
        if self._channel is None:
            return
        try:
            self._channel.send_all(frames, fds)
            if frames[-1].wait and self._channel.receive() is None:
                self.kill()
        except OSError as error:
            self.kill()
            if error.errno == errno.EBADF:
                raise

    def kill(self) -> None:
        """Whatever it is at: it may have been stopped, and must not wake to an end of the
        channel that is none of the controller."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._take_leave()

    def wait_for_end(self) -> None:
        """It was told to end."""
        if not fork.wait_for_end(self._pidfd, PATIENCE_S):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._take_leave()
        os.close(self._pidfd)

    def _take_leave(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        reap(self._pidfd)


def reap(pidfd: int) -> None:
    """If it is our child, and unless that was done before."""
    with suppress(ChildProcessError):
        if ended := os.waitid(os.P_PIDFD, pidfd, os.WEXITED):
            fork.is_done(ended.si_pid)
