"""One worker's processes and what ties them to us: pidfd, channel, standard error."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from steer.child import main
from steer.child.launch import Launch
from steer.config.address import Bind
from steer.errors import SteerError
from steer.guard.client import GuardClient
from steer.guard.entry import Entry
from steer.linux import fork, processes
from steer.linux.family import Family
from steer.sockets import port_checks, reuseport
from steer.sockets.listeners import Borrower
from steer.workers.channel import WorkerChannel
from steer.workers.finish import Finishing
from steer.workers.readers import Readers
from steer.workers.standard_error import StandardError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_LOOK_AGAIN_S = 0.05
_LEFTOVERS_S = 2.0
"""For what a killed process leaves behind to be gone as well."""


class Running(msgspec.Struct, frozen=True):
    """A process, for whoever goes on with it.

    Args:
        told_to_finish: whether it was told to finish.
    """

    pid: int
    started_s: float
    bound: tuple[int, ...]
    told_to_finish: bool


@contextmanager
def bound(launch: Launch) -> Iterator[Sequence[socket.socket]]:
    """The sockets of a new worker, one for each bind; over TCP they listen. Closed at the end.

    Made by whoever forks it, one process after the other: so it is known in which order they
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
        raise port_checks.bind_error(bind, error) from None


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


def begin_all(started: Sequence[WorkerProcess], guard: GuardClient) -> None:
    """Have the guard know of them, and only then have them go on.

    Raises:
        KernelError: the guard cannot.
    """
    try:
        with guard.together():
            for one in started:
                one.keep(b"")
    except OSError as error:
        raise fork.fork_error(error) from None
    for one in started:
        one.go_on()


class WorkerProcess:
    """A worker's processes and what ties them to us, from fork to the end.

    Args:
        launch: what the worker is told.
        guard: has the descriptors, too, in case we are killed.

    Attributes:
        pid, family: its first process, and all of them.
        bound: inodes of its sockets, one for each bind.
        is_open: until `let_go`.
        is_killed: all of its processes were killed.
        left_behind: its processes that were there when the first ended by itself; they were
            told to end.
    """

    def __init__(self, launch: Launch, guard: GuardClient) -> None:
        self.launch = launch
        self.bound: tuple[int, ...] = ()
        self.inodes: frozenset[int] = frozenset()
        self.is_open, self.is_killed = True, False
        self.left_behind: Sequence[int] = ()
        self._guard = guard
        self._is_child = True
        self._readers = Readers()
        self._ended: Callable[[], None] | None = None
        self._problem: SteerError | None = None

    # How it begins.

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
        sock, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.callback(sock.close)
        theirs.callback(channel.close)
        self._channel = WorkerChannel(sock, self.launch, self._readers)
        self._stderr_fd, stderr = os.pipe()
        ours.callback(os.close, self._stderr_fd)
        theirs.callback(os.close, stderr)
        os.set_blocking(self._stderr_fd, False)
        return partial(main.main, self.launch, channel, stderr, own)

    def forked(self, pid: int, pidfd: int) -> None:
        """It is there."""
        self.started_s = time.monotonic()
        self._is(pid, pidfd)

    def go_on(self) -> None:
        """See `begin_all`."""
        self._channel.go_on()

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
        self.started_s, self.bound = saved.started_s, saved.bound
        pidfd, self._stderr_fd, channel = entry.fds[:3]
        self._channel = WorkerChannel(socket.socket(fileno=channel), launch, self._readers)
        self._is_child = processes.parent(saved.pid) == os.getpid()
        if self._is_child:
            fork.began(saved.pid)
        self._is(saved.pid, pidfd, saved.told_to_finish)
        return self

    def _is(self, pid: int, pidfd: int, told_to_finish: bool = False) -> None:
        self.pid, self._pidfd = pid, pidfd
        self.family = Family(pid, self._is_child)
        self.family.sockets = self.inodes = frozenset(self.bound)
        self._borrower = Borrower(pid, self.inodes)
        self._stderr = StandardError(self._stderr_fd, pid, self.launch, self._readers)
        self._finishing = Finishing(self.launch.service, self.family, pidfd, told_to_finish)

    # What the guard has of it.

    @property
    def key(self) -> str:
        """Under which the guard has it."""
        return f"worker {self.pid}"

    @property
    def running(self) -> Running:
        """What `adopted` has to be told."""
        return Running(self.pid, self.started_s, self.bound, self.told_to_finish)

    def keep(self, value: bytes, held: Sequence[int] = (), look: bool = True) -> None:
        """Have the guard keep `value` with what ties the process to us, and `held`.

        Args:
            look: see `Finishing.how`: whether it may run another program by now.
        """
        fds = (self._pidfd, self._stderr_fd, self._channel.socket.fileno(), *held)
        self._guard.put(self.key, value, fds, self.pid, self._finishing.how(look).first)

    # What can be seen of it.

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
        self._ended = ended
        self._readers.watch(loop)
        self._channel.watch(self.kill)
        self._stderr.watch()
        self._readers.add(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        self._readers.remove(self._pidfd)
        if self._ended is not None:
            self._ended()

    @property
    def is_callable(self) -> bool:
        """Whether it is Python of ours that calls the application, and no other program."""
        return not self.launch.service.command

    @property
    def problem(self) -> SteerError | None:
        """Why it is about to end, if that is known."""
        return self._channel.problem or self._problem

    @problem.setter
    def problem(self, problem: SteerError) -> None:
        self._problem = problem

    @property
    def last_words(self) -> str:
        """The last lines it wrote to standard error."""
        return self._stderr.last_words

    def pass_rest_on(self) -> None:
        """See `StandardError.pass_rest_on`."""
        self._stderr.pass_rest_on()

    # How it ends.

    @property
    def told_to_finish(self) -> bool:
        """Whether it was told to finish."""
        return self._finishing.told_to_finish

    @property
    def why_this_signal(self) -> str:
        """See `Finishing.why_this_signal`."""
        return self._finishing.why_this_signal

    def terminate(self, quick: bool = False) -> None:
        """Tell it to finish; see `Finishing.tell`."""
        self._finishing.tell(quick)

    def tell_others(self, pids: Iterable[int]) -> None:
        """These of its processes are to end, as the first has."""
        self._finishing.tell_others(pids)

    def kill_group(self) -> None:
        """All of its processes but those that have left its group, see `Family.others`."""
        self.is_killed = True
        self.family.kill_group()

    def kill(self) -> None:
        """All of its processes."""
        self.is_killed = True
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
            then.callback(self._stderr.read_out)
            then.callback(self._channel.hear)
            # Before it is waited for: until then its number is not another's.
            self._guard.drop(self.key)
            return fork.reap(self.pid, self._pidfd, self._is_child)

    def _close(self) -> None:
        self._readers.remove(self._pidfd)
        self._channel.close()
        self._stderr.close()
        os.close(self._pidfd)
        self.is_open = False
        self._ended = None  # it has us, and without this cycle nobody needs to look for garbage


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
