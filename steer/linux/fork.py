"""Forks processes, executes programs, and signals and waits for workers."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from steer.errors import KernelError, in_words
from steer.linux import child_exit
from steer.linux.signals import IGNORED_BY_PYTHON, OURS

if TYPE_CHECKING:
    import subprocess

_LIBC = ctypes.CDLL(None)
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_started: set[int] = set()
"""Children of this process that the code which started them waits for."""
_inherited: list[int] = []
"""A pipe that a forked child has open until it has closed what it inherited."""
_CLOSED_S = 1.0
_starting: set[object] = set()
"""One object for each program that is being started."""


def fork(child: Callable[[], int], ignored: Collection[int] = ()) -> tuple[int, int]:
    """Fork one child, as `fork_all` does."""
    return fork_all([child], ignored)[0]


def fork_all(
    children: Sequence[Callable[[], int]], ignored: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Run each function in a new process with a process group of its own; what it returns is the
    exit code. If one process cannot be forked, none is left.

    Signals are blocked until the child has reset the handlers that it inherits: an earlier signal
    would be handled as if it were sent to this process. Nothing is done between two forks, because
    each page of memory that is written is copied once more for each child.

    Args:
        ignored: signals that the children ignore.

    Returns:
        The process id and a pidfd of each.

    Raises:
        OSError: no process or no descriptor is left; see `fork_error`.
    """
    child_exit.flush()
    if not _inherited:
        _inherited[:] = os.pipe()
    pids: list[int] = []
    with ExitStack() as undo:
        undo.callback(_end_all, pids)
        # No other signal has a handler, and blocking all 64 takes a third of a millisecond.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
        try:
            for child in children:
                pid = os.fork()
                if pid == 0:
                    _in_child(child, blocked, ignored)
                pids.append(pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        pidfds = []
        for pid in pids:
            # Here and in the child, as either may rely on it first.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(pid, pid)
            pidfds.append(os.pidfd_open(pid))
            undo.callback(os.close, pidfds[-1])
        undo.pop_all()
    _started.update(pids)
    return list(zip(pids, pidfds, strict=True))


def _end_all(pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def await_descriptors_closed() -> bool:
    """Wait until all forked children have closed the descriptors that they inherited and do not
    need. A child does that first (`keep_only`), but only when it gets a CPU.

    Returns:
        Whether all have closed them. The wait is limited, as a child may be stopped.
    """
    if not _inherited:
        return True
    reading, writing = _inherited
    _inherited.clear()
    os.close(writing)
    try:
        return wait_until_readable(reading, _CLOSED_S)
    finally:
        os.close(reading)


def started() -> frozenset[int]:
    """The children that this process has forked and not waited for."""
    return frozenset(_started)


def add_started(pid: int) -> None:
    """Add a child to `started`, for example one that was forked before execve(2)."""
    _started.add(pid)


def remove_started(pid: int) -> None:
    """Remove a child from `started`, after it was waited for."""
    _started.discard(pid)


@contextlib.contextmanager
def starting() -> Iterator[Callable[[int], None]]:
    """Surround the start of a program. Call the yielded function with its process ID: until
    `remove_started` the program is one of `started`."""
    token = object()
    _starting.add(token)
    try:
        yield add_started
    finally:
        _starting.discard(token)


def is_starting() -> bool:
    """Whether there may be a child that is not yet among `started`. Call this after the children
    were listed."""
    return bool(_starting)


def run(
    arguments: Sequence[str],
    timeout_s: float,
    directory: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program and wait for its end, in any thread. No other code waits for it.

    Args:
        directory, environment: None to use those of this process.

    Returns:
        Its exit status, and what it wrote to standard output and error.

    Raises:
        OSError: the program cannot be started.
        subprocess.TimeoutExpired: the program took longer, and was killed.
    """
    import subprocess

    pipe = subprocess.PIPE
    with starting() as began_as:
        child = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            cwd=directory,
            env=environment,
        )
        began_as(child.pid)
    try:
        with child:
            try:
                output, errors = child.communicate(timeout=timeout_s)
            except BaseException:
                child.kill()
                raise
    finally:
        remove_started(child.pid)
    return subprocess.CompletedProcess(arguments, child.returncode, output, errors)


def fork_error(error: OSError) -> KernelError:
    """The error for a user if a worker's process, pipe or socket could not be created."""
    cures = {
        errno.EAGAIN: "raise the limit on processes (ulimit -u, TasksMax=)",
        errno.EMFILE: "raise the limit on open files (ulimit -n, LimitNOFILE=)",
    }
    return KernelError.from_oserror("start a worker", error, cures, cause=in_words(error))


def _in_child(child: Callable[[], int], mask: Iterable[int], ignored: Collection[int]) -> NoReturn:
    child_exit.exit_with(partial(_run, child, mask, ignored))


def _run(child: Callable[[], int], mask: Iterable[int], ignored: Collection[int]) -> int:
    """Reset what this process inherited from the controller, and run a child."""
    # The child must not collect garbage of its parent: that could close descriptors whose
    # numbers are used again, or unmap memory that is not mapped here.
    gc.freeze()
    gc.enable()
    signal.set_wakeup_fd(-1)
    _started.clear()
    _starting.clear()
    _inherited.clear()
    for number in OURS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, set(mask).difference(OURS))
    return child()


def rename(name: str) -> None:
    """Set the name in ps(1) and killall(1), at most 15 characters (PR_SET_NAME of prctl(2))."""
    _LIBC.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def be_dumpable() -> None:
    """Set PR_SET_DUMPABLE of prctl(2), which a change of user clears. Without it, other processes
    of the same user cannot read /proc of this process."""
    _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid > 0


def wait_until_readable(fd: int, timeout_s: float | None) -> bool:
    """Whether a descriptor becomes readable within the time; None waits without limit.

    This does not use select(2), which takes no descriptor above 1023.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def wait_for_end(pidfd: int, timeout_s: float | None) -> bool:
    """Whether a process ends within the time. A pidfd is readable then (pidfd_open(2))."""
    return wait_until_readable(pidfd, timeout_s)


def terminate(pidfd: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to a worker's first process only. If all processes got it, the workers of
    hypercorn would drop their connections."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def kill_group(pid: int) -> None:
    """Send SIGKILL to the process group of a worker."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def reap(pid: int, pidfd: int, is_child: bool) -> int | None:
    """Wait for a worker's first process to end.

    Args:
        is_child: whether it is a child of this process. An adopted worker has another parent.

    Returns:
        Its exit status, or the negative number of the signal that killed it. None if another
        process is its parent, or if it was waited for already.
    """
    wait_for_end(pidfd, None)
    remove_started(pid)
    if not is_child:
        return None
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def how_it_ended(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # most real-time signals have no name
        return f"killed by signal {-status}"


def venv_hint(program: str) -> str:
    """A hint for a program that is not on PATH but in steer's virtual environment; "" if it is not
    there.

    steer runs without the environment being activated, and sudo has a PATH of its own.
    """
    directory = os.path.dirname(sys.executable)
    path = os.path.join(directory, program)
    if "/" in program or not os.access(path, os.X_OK):
        return ""
    return f"it is in {directory}, which is not on PATH: write {path}"


def execute(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Execute another program in this process, found on PATH. Raises OSError as execve(2) does."""
    for number in IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(arguments[0], list(arguments), environment)
