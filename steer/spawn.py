"""One worker process and what ties it to us: its pidfd, its channel, its standard error."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import msgspec

from steer import worker
from steer.errors import AppLoadError, SteerError, WorkersFailed
from steer.kernel import process, sockets
from steer.worker import Launch, Message

LAST_WORDS = 20
"""Lines of standard error that are kept of each worker."""
_CHUNK_BYTES = 65536
_MAX_FDS = 253
"""SCM_MAX_FD of include/net/scm.h: so many binds a service can have."""


class Process:
    """A worker, from fork to the end.

    Args:
        launch: what it is told.
        joined: called with its sockets' duplicates once they are bound; the
            descriptors are the callee's.
        ended: called once, with the exit status, when it is gone.

    Raises:
        KernelError: no more processes, or no more files.
    """

    def __init__(
        self,
        launch: Launch,
        joined: Callable[[Process, Sequence[int]], None],
        ended: Callable[[Process, int], None],
    ) -> None:
        self.launch = launch
        self.started_s = time.monotonic()
        self.inodes: frozenset[int] = frozenset()
        self.problem: SteerError | None = None
        self._joined, self._ended = joined, ended
        self._loop = asyncio.get_running_loop()
        self._words: deque[bytes] = deque(maxlen=LAST_WORDS)
        self._unfinished = b""
        self.bound: asyncio.Future[None] = self._loop.create_future()
        try:
            self._fork()
        except OSError as error:
            raise process.fork_error(error) from None
        self._watch()

    def _fork(self) -> None:
        with ExitStack() as theirs, ExitStack() as ours:
            self._channel, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.callback(self._channel.close)
            theirs.callback(channel.close)
            self._stderr, stderr = os.pipe()
            ours.callback(os.close, self._stderr)
            theirs.callback(os.close, stderr)
            self.pid, self._pidfd = process.fork(lambda: worker.main(self.launch, channel, stderr))
            ours.pop_all()

    def _watch(self) -> None:
        os.set_blocking(self._stderr, False)
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._on_channel)
        self._loop.add_reader(self._stderr, self._on_stderr)
        self._loop.add_reader(self._pidfd, self._on_end)

    @property
    def last_words(self) -> str:
        """The last lines it wrote to standard error."""
        lines = [*self._words, *([self._unfinished] if self._unfinished else [])]
        return "\n".join(line.decode(errors="replace") for line in lines[-LAST_WORDS:])

    def terminate(self) -> None:
        process.terminate(self._pidfd)

    def kill(self) -> None:
        process.kill_group(self.pid)

    def _on_channel(self) -> bool:
        """Read one message, if there is one."""
        try:
            data, fds, _, _ = socket.recv_fds(self._channel, _CHUNK_BYTES, _MAX_FDS)
        except BlockingIOError:
            return False
        except ConnectionError:
            data, fds = b"", []
        if data:
            self._on_message(msgspec.json.decode(data, type=Message), fds)
            return True
        self._loop.remove_reader(self._channel)
        self._settle(WorkersFailed(f"start worker {self.launch.slot}", "it ended at once"))
        return False

    def _on_message(self, message: Message, fds: Sequence[int]) -> None:
        if message.bound:
            self.inodes = frozenset(message.bound)
            try:
                self._joined(self, fds)
            except SteerError as error:
                # Running, but not to be reached: better another try.
                self.problem = error
                self.kill()
            self._settle(self.problem)
        elif message.refused is not None:
            bind = self.launch.binds[message.refused]
            self.problem = sockets.bind_error(bind, OSError(message.number, ""))
            self._settle(self.problem)
        else:
            app = self.launch.service.app
            what = f"load {app}" if app else f"start {self.launch.name}"
            self.problem = AppLoadError(what, message.unloadable, detail=message.detail)

    def _settle(self, error: SteerError | None) -> None:
        if self.bound.done():
            return
        if error is None:
            self.bound.set_result(None)
        else:
            self.bound.set_exception(error)
            self.bound.exception()  # retrieved here: nobody may be waiting

    def _on_stderr(self) -> bool:
        """Pass on what there is, and keep the last lines for when they are asked for."""
        try:
            data = os.read(self._stderr, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._stderr)
            return False
        process.write_stderr(data)
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._words.extend(lines)
        return True

    def _on_end(self) -> None:
        """It is gone; what it said last may still have to be read."""
        status = process.reap(self.pid, self._pidfd)
        while self._on_channel():
            pass
        while self._on_stderr():
            pass
        self._close()
        self._ended(self, status)

    def _close(self) -> None:
        for fd in (self._channel.fileno(), self._stderr, self._pidfd):
            self._loop.remove_reader(fd)
        self._channel.close()
        os.close(self._stderr)
        os.close(self._pidfd)
