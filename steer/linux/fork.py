"""Processes: fork, signals to a whole worker, identity."""

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
from typing import TYPE_CHECKING, NoReturn

from steer.errors import KernelError, in_words
from steer.linux.signals import IGNORED_BY_PYTHON, OURS
from steer.linux.stdio import write_stderr

if TYPE_CHECKING:
    import subprocess

_LIBC = ctypes.CDLL(None)
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_started: set[int] = set()
"""Children of this process that somebody here waits for."""
_inherited: list[int] = []
"""A pipe that those of them have a copy of who still have all that was open here."""
_APART_S = 1.0
_starting: set[object] = set()
"""Of programs that are being started, each by whoever starts it."""


def fork(child: Callable[[], int], ignored: Collection[int] = ()) -> tuple[int, int]:
    """As `fork_all`, of one."""
    return fork_all([child], ignored)[0]


def fork_all(
    children: Sequence[Callable[[], int]], ignored: Collection[int] = ()
) -> list[tuple[int, int]]:
    """Run each in a new process, in a process group of its own, or none of them; its result is
    the exit code.

    Signals are held until the child has put aside the handlers it inherits: one that
    came before would be handled as if it were meant for this process. Between two forks
    nothing is done: all that we write to is copied for each child once more.

    Args:
        ignored: signals that the children are to ignore, from the first on.

    Returns:
        Of each the process id, and a pidfd.

    Raises:
        OSError: no more processes, or no more files; see `fork_error`.
    """
    _flush()
    if not _inherited:
        _inherited[:] = os.pipe()
    pids: list[int] = []
    with ExitStack() as undo:
        undo.callback(_end_all, pids)
        # Of the others none has a handler, and to name all 64 takes a third of a millisecond.
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
            # Here and in the child, as either may be first to rely on it.
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


def await_apart() -> bool:
    """Return once no child that was forked here has what was open here any more, but for what it
    is to keep: it closes the rest first (`keep_only`), and not before it gets a CPU.

    Returns:
        Whether that is so; one that is stopped is not waited for.
    """
    if not _inherited:
        return True
    reading, writing = _inherited
    _inherited.clear()
    os.close(writing)
    try:
        return wait_until_readable(reading, _APART_S)
    finally:
        os.close(reading)


def started() -> frozenset[int]:
    """The children of this process that were forked here, and not yet waited for."""
    return frozenset(_started)


def began(pid: int) -> None:
    """A child that this process forked before it was executed again."""
    _started.add(pid)


def is_done(pid: int) -> None:
    """It was waited for."""
    _started.discard(pid)


@contextlib.contextmanager
def starting() -> Iterator[Callable[[int], None]]:
    """While a program is started whose process id is known only then. To be told to what is
    given: from then on until `is_done` the program is one of `started`."""
    token = object()
    _starting.add(token)
    try:
        yield began
    finally:
        _starting.discard(token)


def is_starting() -> bool:
    """Whether there may be a child that will be among `started`, and is not yet. To be asked
    after the children were listed."""
    return bool(_starting)


def run(
    arguments: Sequence[str],
    timeout_s: float,
    directory: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, in any thread; nobody else waits for it.

    Args:
        directory, environment: None: ours.

    Returns:
        With what it wrote to standard output and error.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it took longer, and was killed.
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
        is_done(child.pid)
    return subprocess.CompletedProcess(arguments, child.returncode, output, errors)


def fork_error(error: OSError) -> KernelError:
    """What it means that a process, or what ties it to us, cannot be made."""
    cures = {
        errno.EAGAIN: "raise the limit on processes (ulimit -u, TasksMax=)",
        errno.EMFILE: "raise the limit on open files (ulimit -n, LimitNOFILE=)",
    }
    return KernelError.from_oserror("start a worker", error, cures, cause=in_words(error))


def _in_child(child: Callable[[], int], mask: Iterable[int], ignored: Collection[int]) -> NoReturn:
    """Never returns into the parent's stack, whatever happens: what runs here may have
    replaced anything of Python's that we use."""
    code = 1
    try:
        code = _run(child, mask, ignored)
        _flush()
    finally:
        os._exit(code)


def _run(child: Callable[[], int], mask: Iterable[int], ignored: Collection[int]) -> int:
    """The exit code of what a child is to do, from 0 to 255."""
    try:
        # What nobody refers to any more must not be found to be garbage here: it would close
        # numbers that are by then another's, or unmap what was never mapped here.
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
    except SystemExit as done:
        return _exit_code(done.code)
    except BaseException as error:  # noqa: BLE001 - shown, and this process ends here
        _show(error)
        return 1


def _exit_code(value: object) -> int:
    """As Python's own end of a program has it: what is no number is shown, and a failure.

    A number that is none of a C long is -1 (handle_system_exit() of CPython's pythonrun.c).
    """
    if value is None or isinstance(value, int):
        number = value or 0
        return number & 0xFF if -(1 << 63) <= number < 1 << 63 else 0xFF
    _complain(f"{value}\n")
    return 1


def _show(error: BaseException) -> None:
    """As Python does, or to descriptor 2 where that cannot be."""
    try:
        if _takes_text(sys.stderr):
            sys.excepthook(type(error), error, error.__traceback__)
            return
    except Exception:  # noqa: BLE001 - the application's hook
        pass
    import traceback

    _complain("".join(traceback.format_exception(error)))


def _complain(text: str) -> None:
    """Say it on standard error, whatever that is by now."""
    if _takes_text(sys.stderr):
        sys.stderr.write(text)
    else:
        write_stderr(text.encode(errors="backslashreplace"))


def _takes_text(stream: object) -> bool:
    try:
        stream.write("")  # type: ignore[attr-defined]
        stream.flush()  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - it may be any object
        return False
    return True


def _flush() -> None:
    """What nobody can take is dropped. An application may have put anything in their place."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]


def rename(name: str) -> None:
    """Be called so by ps(1) and killall(1): at most 15 characters (prctl(2), PR_SET_NAME)."""
    _LIBC.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def be_dumpable() -> None:
    """Let others of our user look at us, as a change of user takes away (prctl(2))."""
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
    """Whether there was something to read within the time; None waits for as long as it takes.

    Not by select(2), which takes no descriptor above 1023.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def wait_for_end(pidfd: int, timeout_s: float | None) -> bool:
    """Whether the process ended within the time (pidfd_open(2): readable when it has)."""
    return wait_until_readable(pidfd, timeout_s)


def terminate(pidfd: int, number: int = signal.SIGTERM) -> None:
    """A signal to a worker's first process, and not to all: hypercorn's own workers would
    drop what they have."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def kill_group(pid: int) -> None:
    """SIGKILL all that is left of a worker's process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def reap(pid: int, pidfd: int, is_child: bool) -> int | None:
    """Take leave of a worker's first process once it has ended.

    Of one that was adopted somebody else is the parent, who may have waited for it a moment ago.

    Returns:
        Its exit status, negative for the signal that ended it; None if somebody else is its
        parent, or has waited for it.
    """
    wait_for_end(pidfd, None)
    is_done(pid)
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


def beside_us(program: str) -> str:
    """Where a program that is not on PATH is nevertheless, as a sentence's end; "" if it is not.

    In the virtual environment that steer is installed in, that is: it need not be activated for
    steer to start, and sudo has a PATH of its own.
    """
    directory = os.path.dirname(sys.executable)
    path = os.path.join(directory, program)
    if "/" in program or not os.access(path, os.X_OK):
        return ""
    return f"it is in {directory}, which is not on PATH: write {path}"


def execute(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Become another program, found on PATH. Raises OSError as execve(2)."""
    for number in IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(arguments[0], list(arguments), environment)
