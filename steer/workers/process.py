"""One worker's processes, and their connections to us: pidfd, channel, standard error."""

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
from steer.child.launch import Launch, NewWorker
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
"""The time for killed processes to disappear."""


class Running(msgspec.Struct, frozen=True):
    """What is stored of a process for the next controller.

    Args:
        told_to_finish: whether the process was told to finish.
    """

    pid: int
    started_s: float
    bound: tuple[int, ...]
    told_to_finish: bool


@contextmanager
def bound(launch: Launch) -> Iterator[Sequence[socket.socket]]:
    """The sockets of a new worker, one for each bind; TCP sockets listen. Closed at the end.

    The controller makes them, one worker after another. So it knows the order in which they join
    their groups without asking.

    Raises:
        BindError: an address cannot be bound, or an option cannot be set.
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


class TemplateLost(Exception):
    """A template process did not fork workers as it was asked to, and was killed. Some of the
    workers may have been forked."""


ForkWorkers = Callable[[Sequence[NewWorker]], Sequence[tuple[int, int]]]
"""Forks a process for each of these workers, or for none. Returns the process ID and a pidfd of
each. Raises OSError, TemplateLost."""


def fork_from_nothing(new: Sequence[NewWorker]) -> Sequence[tuple[int, int]]:
    """Fork workers from this process, which has not loaded the application. Raises OSError."""
    return fork.fork_all([partial(main.main, each) for each in new])


def fork_all(
    launches: Sequence[Launch],
    guard: GuardClient,
    owned: Sequence[Sequence[socket.socket]],
    fork_workers: ForkWorkers,
) -> list[WorkerProcess]:
    """Fork a process for each, or for none. The processes wait until `begin_all`.

    Args:
        guard: stores them for the next controller.
        owned: the sockets of each, see `bound`. The caller closes them.

    Raises:
        KernelError: no more processes, or no more files.
        TemplateLost
    """
    made = [WorkerProcess(launch, guard) for launch in launches]
    with ExitStack() as for_child, ExitStack() as for_controller:
        try:
            pairs = zip(made, owned, strict=True)
            new = [one.prepare(own, for_child, for_controller) for one, own in pairs]
            for one, (pid, pidfd) in zip(made, fork_workers(new), strict=True):
                one.forked(pid, pidfd)
        except OSError as error:
            raise fork.fork_error(error) from None
        for_controller.pop_all()
    return made


def begin_all(started: Sequence[WorkerProcess], guard: GuardClient) -> None:
    """Have the guard store the processes, and only then let them run.

    Raises:
        KernelError: the guard cannot store them.
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
    """A worker's processes, and their channels to the controller, from the fork to the end.

    Args:
        launch: the instructions for the worker.
        guard: stores the descriptors for the next controller.

    Attributes:
        pid, family: its first process, and all its processes.
        bound: inodes of its sockets, one for each bind.
        has_ended: whether its first process was seen to have ended.
        is_open: whether `let_go` was not called yet.
        is_killed: whether all of its processes were killed.
        left_behind: its processes that were running when the first ended by itself; they were
            told to exit.
    """

    def __init__(self, launch: Launch, guard: GuardClient) -> None:
        self.launch = launch
        self.bound: tuple[int, ...] = ()
        self.inodes: frozenset[int] = frozenset()
        self.has_ended, self.is_open, self.is_killed = False, True, False
        self.left_behind: Sequence[int] = ()
        self._guard = guard
        self._is_child = True
        self._readers = Readers()
        self._ended: Callable[[], None] | None = None
        self._problem: SteerError | None = None

    # How it begins.

    def prepare(
        self, own: Sequence[socket.socket], for_child: ExitStack, for_controller: ExitStack
    ) -> NewWorker:
        """Open the channel and the pipe of the process.

        Args:
            for_child: closes the descriptors that only the process needs, once it is forked.
            for_controller: closes the other descriptors if the process cannot be forked.

        Raises:
            OSError: no more files.
        """
        self.bound = tuple(processes.socket_inode(sock.fileno()) for sock in own)
        sock, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for_controller.callback(sock.close)
        for_child.callback(channel.close)
        self._channel = WorkerChannel(sock, self.launch, self._readers)
        self._stderr_fd, stderr = os.pipe()
        for_controller.callback(os.close, self._stderr_fd)
        for_child.callback(os.close, stderr)
        os.set_blocking(self._stderr_fd, False)
        return NewWorker(self.launch, channel, stderr, own)

    def forked(self, pid: int, pidfd: int) -> None:
        """The process was forked."""
        self.started_s = time.monotonic()
        self._is(pid, pidfd)

    def go_on(self) -> None:
        """See `begin_all`."""
        self._channel.go_on()

    @classmethod
    def adopted(
        cls, launch: Launch, guard: GuardClient, saved: Running, entry: Entry
    ) -> WorkerProcess | None:
        """A process that another controller started, from the guard's entry; None if it has ended.
        This object closes the descriptors, except those of the sockets."""
        if not entry.fds:
            _kill_remains(saved.pid, entry.group)
            return None
        self = cls(launch, guard)
        self.started_s, self.bound = saved.started_s, saved.bound
        pidfd, self._stderr_fd, channel = entry.fds[:3]
        self._channel = WorkerChannel(socket.socket(fileno=channel), launch, self._readers)
        self._is_child = processes.parent(saved.pid) == os.getpid()
        if self._is_child:
            fork.add_started(saved.pid)
        self._is(saved.pid, pidfd, saved.told_to_finish)
        return self

    def _is(self, pid: int, pidfd: int, told_to_finish: bool = False) -> None:
        self.pid, self._pidfd = pid, pidfd
        self.family = Family(pid, self._is_child)
        self.family.sockets = self.inodes = frozenset(self.bound)
        self._borrower = Borrower(pid, self.inodes)
        form, slot = self.launch.service.log_format, self.launch.slot
        self._stderr = StandardError(self._stderr_fd, pid, form, slot, self._readers)
        self._finishing = Finishing(self.launch.service, self.family, pidfd, told_to_finish)

    # What the guard has of it.

    @property
    def key(self) -> str:
        """The key of its entry in the guard."""
        return f"worker {self.pid}"

    @property
    def running(self) -> Running:
        """What to store of it, for `adopted`."""
        return Running(self.pid, self.started_s, self.bound, self.told_to_finish)

    def keep(self, value: bytes, held: Sequence[int] = (), look: bool = True) -> None:
        """Have the guard store `value`, the descriptors of the process, and `held`.

        Args:
            look: see `Finishing.how`: whether it may run another program by now.
        """
        fds = (self._pidfd, self._stderr_fd, self._channel.socket.fileno(), *held)
        self._guard.put(self.key, value, fds, self.pid, self._finishing.how(look).first)

    # What can be seen of it.

    @contextmanager
    def sockets(self) -> Iterator[Mapping[int, socket.socket]]:
        """Lend the sockets that it has open, by bind.

        Raises:
            KernelError: they may not be borrowed.
        """
        with self._borrower.borrow() as lent:
            yield {self.bound.index(inode): sock for inode, sock in lent.items()}

    def watch(self, loop: AbstractEventLoop, ended: Callable[[], None]) -> None:
        """Watch it in this loop.

        Args:
            ended: called once, when its first process has ended. Others may still be running.
        """
        self._ended = ended
        self._readers.watch(loop)
        self._channel.watch(self.kill)
        self._stderr.watch()
        self._readers.add(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        self.has_ended = True
        self._readers.remove(self._pidfd)
        if self._ended is not None:
            self._ended()

    @property
    def is_callable(self) -> bool:
        """Whether steer's own Python code calls the application, instead of running a command."""
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
        """Whether the worker was told to finish."""
        return self._finishing.told_to_finish

    @property
    def why_this_signal(self) -> str:
        """See `Finishing.why_this_signal`."""
        return self._finishing.why_this_signal

    def signal(self, number: int) -> None:
        """Send a signal to its first process."""
        fork.terminate(self._pidfd, number)

    def terminate(self, quick: bool = False) -> None:
        """Tell it to finish; see `Finishing.tell`."""
        self._finishing.tell(quick)

    def signal_others(self, pids: Iterable[int]) -> None:
        """Tell these of its processes to exit, as the first has ended."""
        self._finishing.signal_others(pids)

    def kill_group(self) -> None:
        """Kill its processes, except those that have left its group; see `Family.others`."""
        self.is_killed = True
        self.family.kill_group()

    def kill(self) -> None:
        """Kill all of its processes."""
        self.is_killed = True
        self.family.kill()

    def end(self) -> int | None:
        """Kill its processes and release it. Returns the exit status if it is our child."""
        with suppress(OSError):  # those that have left the group cannot be searched
            self.kill()
        return self.let_go()

    def let_go(self) -> int | None:
        """Release what belongs to it, once its first process has ended. If one step fails, the
        others are still done. Returns the exit status if it is our child."""
        with ExitStack() as then:
            then.callback(self._close)
            then.callback(self._stderr.read_out)
            then.callback(self._channel.receive)
            # Before it is reaped, as its process id can be reused after that.
            self._guard.drop(self.key)
            return fork.reap(self.pid, self._pidfd, self._is_child)

    def _close(self) -> None:
        self._readers.remove(self._pidfd)
        self._channel.close()
        self._stderr.close()
        os.close(self._pidfd)
        self.is_open = False
        self._ended = None  # it refers to us, and the cycle would need the garbage collector


def _kill_remains(pid: int, group: int) -> None:
    """Kill what is left of a worker that ended under another controller, as it may listen."""
    end_s = time.monotonic() + _LEFTOVERS_S
    if group:
        left = Family(group, is_child=False)
        left.kill()
        while left.others() and time.monotonic() < end_s:
            time.sleep(_LOOK_AGAIN_S)
    with suppress(ChildProcessError):  # it is our child if the controller executed itself again
        os.waitpid(pid, os.WNOHANG)
