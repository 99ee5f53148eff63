"""The guard process, as the controller sees it: start it, send to it, end it."""

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
from steer.guard.store import PEER_TIMEOUT_S, ControllerFiles, Settings
from steer.linux import fork


class GuardProcess:
    """There is no process before `start`. If it is killed, nothing here fails: what is sent is then
    lost, see `is_connected`.

    Args:
        control: the listening control socket. The process has a duplicate.
        say: logs a line in the guard process; it must not block.
        predecessor: the channel to the guard process that hands over to this one.

    Attributes:
        pid: the process ID of the guard process.
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
        """Fork the guard process.

        Args:
            inode: the inode of the path of the control socket.

        Raises:
            OSError: no more processes, or no more files; see `fork.fork_error`.
        """
        files, predecessor = ControllerFiles(os.getpid(), inode), self.predecessor
        ours, theirs = socket.socketpair()

        def guard() -> int:
            return standby.main(files, theirs, self._control, settings, self._say, predecessor)

        try:
            self.pid, self._pidfd = fork.fork(guard, standby.IGNORED)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(PEER_TIMEOUT_S)
        self._channel = Channel(ours)

    def fileno(self) -> int:
        """A pidfd of the process, readable once it has ended; -1 before `start`."""
        return self._pidfd

    @property
    def has_ended(self) -> bool:
        """Whether `fileno()` is readable."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def is_connected(self) -> bool:
        """Whether the process still takes what is sent, as far as we know."""
        return self._channel is not None

    def send(self, frames: Sequence[Frame], fds: Sequence[int] = ()) -> None:
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
        """Kill the process. It may have been stopped, and on waking it would take the end of its
        channel for the end of the controller."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._disconnect()

    def wait_for_end(self) -> None:
        """Wait for the process to end, after it was told to."""
        if not fork.wait_for_end(self._pidfd, PEER_TIMEOUT_S):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._disconnect()
        os.close(self._pidfd)

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        reap(self._pidfd)


def reap(pidfd: int) -> None:
    """Wait for a process that has ended, if it is our child and was not waited for before."""
    with suppress(ChildProcessError):
        if ended := os.waitid(os.P_PIDFD, pidfd, os.WEXITED):
            fork.remove_started(ended.si_pid)
