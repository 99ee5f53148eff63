"""One worker process and what ties it to us: its pidfd, its channel, its standard error."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from steer.child import main
from steer.child.launch import MESSAGE_MAX_BYTES, Launch, read
from steer.config.address import Bind
from steer.config.servers import BY_DEFAULT, Finish
from steer.errors import AppLoadError, SteerError, WorkersFailed
from steer.guard.client import Entry, GuardClient
from steer.linux import family, fork, output, processes
from steer.linux.family import Family
from steer.linux.lines import Line, Lines, shown
from steer.sockets import reuseport
from steer.sockets.listeners import Borrower
from steer.values import Invalid
from steer.workers import finish

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

LAST_WORDS = 20
"""Lines of standard error that are kept of each worker."""
_LOOK_AGAIN_S = 0.05
_LINE_BYTES = 4096
"""So much is kept of each."""
_LEFTOVERS_S = 2.0
"""For what a killed process leaves behind to be gone as well."""
_CHUNK_BYTES = 65536
_CHUNKS_AT_END = 16
"""More than a pipe holds (pipe(7))."""


class Running(msgspec.Struct, frozen=True):
    """A process, for whoever goes on with it.

    Args:
        told: whether it was told to finish.
    """

    pid: int
    started_s: float
    bound: tuple[int, ...]
    told: bool


@contextmanager
def bound(launch: Launch) -> Iterator[Sequence[socket.socket]]:
    """The sockets of a new worker, one for each bind; over TCP they listen. Closed at the end.

    Made by whoever forks it, one worker after the other: so it is known in which order they
    join their groups, and nobody waits to be told.

    Raises:
        BindError: an address, or an option, cannot be had.
        KernelError: no more files.
    """
    with ExitStack() as own:
        yield [
            own.enter_context(_bound_to(bind, launch, index in launch.anchored))
            for index, bind in enumerate(launch.binds)
        ]


def _bound_to(bind: Bind, launch: Launch, anchored: bool) -> socket.socket:
    service = launch.service
    try:
        return reuseport.member(bind, service.backlog, settings=service.settings, anchored=anchored)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise fork.fork_error(error) from None
        raise reuseport.bind_error(bind, error) from None


def fork_all(
    launches: Sequence[Launch], guard: GuardClient, owned: Sequence[Sequence[socket.socket]]
) -> list[WorkerProcess]:
    """A process for each, or for none. They do nothing before `begin_all`.

    Args:
        guard: has them too, should we be gone.
        owned: the sockets of each, see `bound`; they stay the caller's, who closes them.

    Raises:
        KernelError: no more processes, or no more files.
    """
    made = [WorkerProcess(launch, guard) for launch in launches]
    with ExitStack() as theirs, ExitStack() as ours:
        try:
            pairs = zip(made, owned, strict=True)
            children = [one.prepare(own, theirs, ours) for one, own in pairs]
            for one, (pid, pidfd) in zip(made, fork.fork_all(children), strict=True):
                one.forked(pid, pidfd)
        except OSError as error:
            raise fork.fork_error(error) from None
        ours.pop_all()
    return made


def begin_all(workers: Sequence[WorkerProcess], guard: GuardClient) -> None:
    """Have the guard know of them, and only then have them go on.

    Raises:
        KernelError: the guard cannot.
    """
    try:
        with guard.together():
            for one in workers:
                one.keep(b"")
    except OSError as error:
        raise fork.fork_error(error) from None
    for one in workers:
        one.go_on()


class WorkerProcess:
    """A worker, from fork to the end.

    Args:
        launch: what it is told.
        guard: has it too, should we be gone.

    Attributes:
        bound: inodes of its sockets, one for each bind.
        told: whether it was told to finish.
        left_behind: its processes that were there when the first ended by itself; they were
            told to end.
    """

    def __init__(self, launch: Launch, guard: GuardClient) -> None:
        self.launch = launch
        self._guard = guard
        self.problem: SteerError | None = None
        self.told = self._hurried = False
        self._finish: Finish | None = None
        self.left_behind: Sequence[int] = ()
        self._is_child = True
        self._is_heard = False
        self._is_killed = False
        self._words: deque[bytes] = deque(maxlen=LAST_WORDS)
        self._lines = Lines()
        self._loop: AbstractEventLoop | None = None
        self._ended: Callable[[], None] | None = None
        self._reading: set[int] = set()
        self.bound: tuple[int, ...] = ()
        self.inodes: frozenset[int] = frozenset()

    def prepare(
        self, own: Sequence[socket.socket], theirs: ExitStack, ours: ExitStack
    ) -> Callable[[], int]:
        """Open what ties it to us; what its process is to do.

        Args:
            theirs: closes what is only of use there.
            ours: closes the rest, should there be no process.

        Raises:
            OSError: no more files.
        """
        self.bound = tuple(processes.socket_inode(sock.fileno()) for sock in own)
        self._channel, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.callback(self._channel.close)
        theirs.callback(channel.close)
        self._stderr, stderr = os.pipe()
        ours.callback(os.close, self._stderr)
        theirs.callback(os.close, stderr)
        os.set_blocking(self._stderr, False)
        return partial(main.main, self.launch, channel, stderr, own)

    def forked(self, pid: int, pidfd: int) -> None:
        """It is there."""
        self.started_s = time.monotonic()
        self.pid, self._pidfd = pid, pidfd
        self.family = Family(pid)
        self._meet()

    def go_on(self) -> None:
        """See `begin_all`."""
        with suppress(OSError):  # it has ended: `watch` tells
            self._channel.send(b"\0")

    @classmethod
    def adopted(
        cls, launch: Launch, guard: GuardClient, saved: Running, entry: Entry
    ) -> WorkerProcess | None:
        """One that another controller started, with what its guard has of it; None if it has
        ended. The descriptors become ours, but for those of its sockets."""
        if not entry.fds:
            _see_off(saved.pid, entry.group)
            return None
        self = cls(launch, guard)
        self.started_s, self.told = saved.started_s, saved.told
        self.pid, (self._pidfd, self._stderr, channel) = saved.pid, entry.fds[:3]
        self._channel = socket.socket(fileno=channel)
        self._is_child = processes.parent(saved.pid) == os.getpid()
        self.family = Family(saved.pid, self._is_child)
        if self._is_child:
            fork.began(saved.pid)
        self.bound = saved.bound
        self._meet()
        return self

    def _meet(self) -> None:
        self.inodes = frozenset(self.bound)
        self._borrower = Borrower(self.pid, self.inodes)
        self.family.sockets = self.inodes

    @property
    def key(self) -> str:
        """Under which the guard has it."""
        return f"worker {self.pid}"

    @property
    def running(self) -> Running:
        """What `adopted` has to be told."""
        return Running(self.pid, self.started_s, self.bound, self.told)

    def keep(self, value: bytes, held: Sequence[int] = (), look: bool = True) -> None:
        """Have the guard keep `value` with what ties the process to us, and `held`.

        Args:
            look: whether it may run another program by now, that is to be told to finish in
                another way.
        """
        fds = (self._pidfd, self._stderr, self._channel.fileno(), *held)
        how = self._how_to_finish() if look or self._finish is None else self._finish
        self._guard.put(self.key, value, fds, self.pid, how.first)

    @contextmanager
    def sockets(self) -> Iterator[Mapping[int, socket.socket]]:
        """Its sockets, by bind, as far as it has them open; lent for a moment.

        Raises:
            KernelError: we may not.
        """
        with self._borrower.borrow() as lent:
            yield {self.bound.index(inode): sock for inode, sock in lent.items()}

    def watch(self, loop: AbstractEventLoop, ended: Callable[[], None]) -> None:
        """Look after it in this loop.

        Args:
            ended: called once, when its first process is gone; others of it may be left.
        """
        self._loop, self._ended = loop, ended
        self._read(self._channel.fileno(), self._on_channel)
        self._read(self._stderr, self._on_stderr)
        self._read(self._pidfd, self._on_end)

    @property
    def is_callable(self) -> bool:
        """Whether it is Python of ours that calls the application, and no other program."""
        return not self.launch.service.command

    @property
    def last_words(self) -> str:
        """The last lines it wrote to standard error."""
        lines = [*self._words, *([self._lines.rest] if self._lines.rest else [])]
        return "\n".join(line.decode(errors="replace") for line in lines[-LAST_WORDS:])

    def terminate(self, quick: bool = False) -> None:
        """Tell it to finish; once, as some servers that are asked again drop what they have.

        Args:
            quick: it need not finish: by SIGTERM, which a server that finishes on another
                signal ends at once on; also where it was told to finish before.
        """
        hurry = quick and not self._hurried and self._how_to_finish().others != signal.SIGTERM
        if not self.told or hurry:
            self.told, self._hurried = True, quick
            try:
                self.family.remember()
            finally:
                fork.terminate(self._pidfd, self._told_by.first)

    @property
    def why_told_so(self) -> str:
        """By which signal it was told to finish, and why, where what it runs decided that; else
        ""."""
        return self._told_by.why

    @property
    def _told_by(self) -> Finish:
        return BY_DEFAULT if self._hurried else self._how_to_finish()

    def _how_to_finish(self) -> Finish:
        """Once that is known it stays: of who has ended it cannot be seen any more. What a command
        has become shows only later."""
        if self._finish is None or (self._finish == BY_DEFAULT and not self.is_callable):
            self._finish = finish.how(self.launch.service, self.pid)
        return self._finish

    @property
    def is_open(self) -> bool:
        """Until `let_go`."""
        return self._stderr >= 0

    @property
    def is_killed(self) -> bool:
        """Whether it was, and all of its processes with it."""
        return self._is_killed

    def tell_others(self, pids: Iterable[int]) -> None:
        """These of its processes are to end, as the first has."""
        family.send(self._told_by.others, pids)

    def kill_group(self) -> None:
        """All of its processes but those that have left its group, see `Family.others`."""
        self._is_killed = True
        self.family.kill_group()

    def kill(self) -> None:
        """All of its processes."""
        self._is_killed = True
        self.family.kill()

    def end(self) -> int | None:
        """Kill what is left of it, and let go of it; the exit status, if it is ours to know."""
        with suppress(OSError):  # those of others groups cannot be looked for
            self.kill()
        return self.let_go()

    def let_go(self) -> int | None:
        """Take leave of it once its first process has ended; the exit status, if it is ours to
        know. Whatever fails of this, the rest is done."""
        with ExitStack() as then:
            then.callback(self._close)
            then.callback(self._hear_out)
            then.callback(self._hear_last)
            # Before it is waited for: until then its number is not another's.
            self._guard.drop(self.key)
            return fork.reap(self.pid, self._pidfd, self._is_child)

    def _close(self) -> None:
        for fd in (self._channel.fileno(), self._stderr, self._pidfd):
            self._forget(fd)
        self._channel.close()
        os.close(self._stderr)
        os.close(self._pidfd)
        self._stderr = -1
        self._ended = None  # it has us, and without this cycle nobody needs to look for garbage

    def _on_end(self) -> None:
        self._forget(self._pidfd)
        if self._ended is not None:
            self._ended()

    def _on_channel(self) -> None:
        """It had something to tell, or has nothing more to."""
        if not self._hear_last():
            self.kill()

    def _hear_last(self) -> bool:
        """Take what it still had to tell; whether that is understood, if there was anything.

        It may be anything, as an application can write there, too. No descriptor is taken in:
        those that come along the kernel closes (unix(7): there is no room for them).
        """
        self._channel.setblocking(False)
        try:
            data = self._channel.recv(MESSAGE_MAX_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._forget(self._channel.fileno())
        if self._is_heard or not data:
            return True
        self._is_heard = True
        try:
            message = read(data)
        except Invalid as error:
            self.problem = self._not_understood(error)
            return False
        app = self.launch.service.app
        what = f"load {app}" if app else f"start {self.launch.name}"
        self.problem = AppLoadError(what, message.unloadable, detail=message.detail)
        return True

    def _not_understood(self, error: Invalid) -> WorkersFailed:
        what = f"worker {self.launch.slot} sent what steer does not understand"
        return WorkersFailed(what, str(error), "it is replaced")

    def _on_stderr(self) -> bool:
        """Pass on what there is, and keep the last lines for when they are asked for.

        While ours takes nothing theirs is not read: the worker waits, not we.
        """
        if not output.stderr.is_clear:
            self._forget(self._stderr)
            output.stderr.when_clear(self._listen_again)
            return False
        return self._hear()

    def _listen_again(self) -> None:
        if self._loop is not None and self._stderr >= 0:
            self._read(self._stderr, self._on_stderr)

    def _hear(self) -> bool:
        try:
            data = os.read(self._stderr, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._forget(self._stderr)
            return False
        self._pass_on(self._lines.feed(data))
        return True

    def pass_rest_on(self) -> None:
        """Of a line that has no end yet, as somebody else may read the next piece."""
        self._pass_on(self._lines.end())

    def _pass_on(self, lines: Iterable[Line]) -> None:
        now = list(lines)
        self._words.extend(line[:_LINE_BYTES] for line, _ in now[-LAST_WORDS:])
        form, slot = self.launch.service.log_format, self.launch.slot
        output.stderr.pass_on(shown(now, form, self.pid, slot, time.time()))

    def _hear_out(self) -> None:
        """What is in the pipe, but not for ever: a process that outlives it may go on writing."""
        for _ in range(_CHUNKS_AT_END):
            if not self._hear():
                break
        self.pass_rest_on()

    def _read(self, fd: int, then: Callable[[], object]) -> None:
        assert self._loop is not None
        self._loop.add_reader(fd, then)
        self._reading.add(fd)

    def _forget(self, fd: int) -> None:
        if fd in self._reading:
            assert self._loop is not None
            self._reading.discard(fd)
            self._loop.remove_reader(fd)


def _see_off(pid: int, group: int) -> None:
    """Take leave of a worker that ended while others looked after it. What it left behind
    may still listen."""
    end_s = time.monotonic() + _LEFTOVERS_S
    if group:
        left = Family(group, is_child=False)
        left.kill()
        while left.others() and time.monotonic() < end_s:
            time.sleep(_LOOK_AGAIN_S)
    with suppress(ChildProcessError):  # it is ours if we have executed ourselves anew
        os.waitpid(pid, os.WNOHANG)
