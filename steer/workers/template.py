"""A template process, as the controller sees it: starts it, has it fork workers, ends it.

What it sends is not trusted, as the code of the application runs in it.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from steer.child import template
from steer.child.launch import NewWorker
from steer.child.preload import MESSAGE_MAX_BYTES, Answer, Preload, Request, read
from steer.errors import AppLoadError, SteerError, WorkersFailed
from steer.linux import fork
from steer.values import Invalid, plural
from steer.workers.process import TemplateLost
from steer.workers.readers import Readers
from steer.workers.standard_error import StandardError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

ANSWER_S = 2.0
"""How long the template process may take to fork a batch of workers. It only waits for requests,
so it has a CPU at once or the machine is stuck."""
_PID_MAX = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""


class Template:
    """One template process. It loads the application while this process goes on.

    Args:
        preload: what it loads, and as which user.

    Attributes:
        pid: its process ID.
        loaded: done once it can fork workers, or holds why it cannot. It exists once `watch` was
            called.
        is_ready: whether it can fork workers.
        began_s: when it was started.

    Raises:
        KernelError: no more processes, or no more files.
    """

    def __init__(self, preload: Preload) -> None:
        self._preload = preload
        self._readers = Readers()
        self.is_ready = False
        self.loaded: Future[None]
        self.began_s = time.monotonic()
        try:
            self.pid, self._pidfd, self._socket, stderr = _start(preload)
        except OSError as error:
            raise fork.fork_error(error) from None
        form = preload.service.log_format
        self._stderr = StandardError(stderr, self.pid, form, None, self._readers)
        self._ended: Callable[[str], None] = lambda _: None

    # What it says.

    def watch(self, loop: AbstractEventLoop, ended: Callable[[str], None]) -> None:
        """Watch it in this loop.

        Args:
            ended: called once, with how it ended, unless `close` was called before.
        """
        self._ended = ended
        self.loaded = loop.create_future()
        self._readers.watch(loop)
        self._readers.add(self._socket.fileno(), self._on_answer)
        self._readers.add(self._pidfd, self._on_end)
        self._stderr.watch()
        limit_s = self._preload.service.ready_timeout
        late = loop.call_later(limit_s, self._on_late, limit_s)
        self.loaded.add_done_callback(lambda _: late.cancel())

    def _on_answer(self) -> None:
        """It sends one answer unasked: whether it has loaded the application."""
        try:
            data = self._socket.recv(MESSAGE_MAX_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._readers.remove(self._socket.fileno())  # it is about to end
            return
        try:
            answer = read(data)
        except Invalid as error:
            self._misunderstood(str(error))
            return
        if answer.unloadable and not self.loaded.done():
            why, detail = answer.unloadable, answer.detail
            self._settle(AppLoadError(f"load {self._app}", why, detail=detail))
        elif answer.is_idle and not self.loaded.done():
            self.is_ready = True
            self._settle(None)
        else:
            self._misunderstood("an answer to no request")

    def _misunderstood(self, why: str) -> None:
        what = "the template process sent what steer does not understand"
        self._settle(WorkersFailed(what, why))
        self.kill()

    def _on_late(self, limit_s: float) -> None:
        cure = "raise ready_timeout"
        why = f"the template process has not loaded it in {limit_s:g} s"
        self._settle(WorkersFailed(f"load {self._app}", why, cure))
        self.kill()

    def _on_end(self) -> None:
        how = fork.how_it_ended(self._reap())
        why = f"the template process ended: {how}"
        self._settle(AppLoadError(f"load {self._app}", why, detail=self._stderr.last_words))
        self._ended(how)

    def _settle(self, problem: SteerError | None) -> None:
        if self.loaded.done():
            return
        if problem is None:
            self.loaded.set_result(None)
        else:
            self.loaded.set_exception(problem)
            self.loaded.exception()  # retrieved here: nobody may be waiting for it

    @property
    def _app(self) -> str | None:
        return self._preload.service.app

    # What it does.

    def fork_workers(self, new: Sequence[NewWorker]) -> Sequence[tuple[int, int]]:
        """See `process.ForkWorkers`. This waits until the template process has forked them.

        Raises:
            OSError: no more processes, or no more files.
            TemplateLost: it gives no answer, or a wrong one, and was killed.
        """
        try:
            answer = self._ask(new)
            if not answer.errno:
                self._check(answer.pids, len(new))
        except (OSError, Invalid) as error:
            self.kill()
            raise TemplateLost(str(error)) from None
        if answer.errno:
            raise OSError(answer.errno, os.strerror(answer.errno))
        with ExitStack() as undo:
            pidfds = []
            for pid in answer.pids:
                undo.callback(os.kill, pid, signal.SIGKILL)
                pidfds.append(os.pidfd_open(pid))
                undo.callback(os.close, pidfds[-1])
            undo.pop_all()
        for pid in answer.pids:
            fork.add_started(pid)
        return list(zip(answer.pids, pidfds, strict=True))

    def _ask(self, new: Sequence[NewWorker]) -> Answer:
        """Send the requests of a batch, and wait for the answer. Raises OSError, Invalid."""
        last = new[-1]
        for each in new:
            data = msgspec.msgpack.encode(Request(each.launch, each is last))
            sockets = (sock.fileno() for sock in each.sockets)
            socket.send_fds(self._socket, [data], [each.channel.fileno(), each.stderr, *sockets])
        answer = read(self._socket.recv(MESSAGE_MAX_BYTES))
        if not answer.is_idle and read(self._socket.recv(MESSAGE_MAX_BYTES)).is_idle:
            return answer
        raise Invalid("the process that forks workers has ended")

    def _check(self, pids: Sequence[int], count: int) -> None:
        """See that these are new children of this process, and neither other processes of steer nor
        strangers: they are going to be signalled. Raises Invalid."""
        different = len(set(pids))
        if different != len(pids) or different != count:
            raise Invalid(f"{plural(different, 'process ID')} in place of {count}")
        known = fork.started()
        for pid in pids:
            if pid in known or not _is_child(pid):
                raise Invalid(f"process {pid} is no new worker")

    # How it ends.

    def kill(self) -> None:
        """Kill it and the processes in its group. Workers have groups of their own."""
        self.is_ready = False
        if self._pidfd >= 0:
            self._readers.remove(self._socket.fileno())
            fork.kill_group(self.pid)

    def close(self) -> None:
        """Kill it, and wait for its end."""
        self._ended = lambda _: None
        self.kill()
        if self._pidfd >= 0:
            self._reap()

    def _reap(self) -> int | None:
        self.is_ready = False
        status = fork.reap(self.pid, self._pidfd, is_child=True)
        self._stderr.read_out()
        self._stderr.close()
        for fd in (self._pidfd, self._socket.fileno()):
            self._readers.remove(fd)
        self._socket.close()
        os.close(self._pidfd)
        self._pidfd = -1
        return status


def _start(preload: Preload) -> tuple[int, int, socket.socket, int]:
    """Fork the template process. Raises OSError.

    Returns:
        Its process ID, a pidfd, our end of the channel, and the reading end of its standard error.
    """
    with ExitStack() as for_child, ExitStack() as undo:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(ours.close)
        for_child.callback(theirs.close)
        reading, writing = os.pipe()
        undo.callback(os.close, reading)
        for_child.callback(os.close, writing)
        os.set_blocking(reading, False)
        ours.settimeout(ANSWER_S)
        pid, pidfd = fork.fork(partial(template.run, preload, theirs, writing))
        undo.pop_all()
    return pid, pidfd, ours, reading


def _is_child(pid: int) -> bool:
    """Whether a process is a child of this one and leads a group of its own."""
    if not 0 < pid <= _PID_MAX:
        return False
    with suppress(ChildProcessError, ProcessLookupError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return os.getpgid(pid) == pid
    return False
