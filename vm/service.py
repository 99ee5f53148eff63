"""`steer run`, forked from here: where all is emulated, a start of Python takes longer than all the
rest. Import what a service imports before, and each is there at once."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from bench import machine, servers
from steer import __main__ as command
from steer.child import demo  # noqa: F401 - for all that are forked
from steer.control import client
from steer.control.schema import Service
from steer.errors import ControlError
from steer.linux.fork import how_it_ended, wait_for_end
from vm.errors import VmError
from vm.promises import HOST, PORT, Broken

NAME = "demo"
_READY_S, _END_S, _ANSWER_S = 120.0, 60.0, 30.0
_PATIENT = ("--ready-timeout", "60", "--hang-timeout", "30")
"""Emulated CPUs are slow, and not all of them run all the time."""
_GONE_S, _LOOK_AGAIN_S = 10.0, 0.1
_LAST_WORDS = 10


@contextmanager
def home() -> Iterator[None]:
    """A network and a directory of its own for all that is done; we are there.

    Raises:
        VmError: that may only root.
    """
    if not machine.is_root():
        raise VmError("make a network namespace to try policies in", "needs root")
    machine.leave_network()
    with tempfile.TemporaryDirectory(prefix="steer-vm-") as name:
        environment = servers.environment(name, XDG_CACHE_HOME=name)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(name)
        try:
            yield
        finally:
            os.chdir("/")


def status() -> Service:
    path = Path(os.environ["STEER_RUNTIME_DIR"], f"{NAME}.sock")
    answer = client.ask(path, "status", _ANSWER_S)
    return msgspec.convert(answer["service"], Service)


@contextmanager
def serving(scheme: str, options: Sequence[str], log: Path) -> Iterator[None]:
    """The demo, ready; afterwards it is ended, and was seen to leave nothing behind.

    Args:
        scheme: "tcp" or "udp".
        options: of `steer run`.
        log: gets what it prints.

    Raises:
        Broken: it does not come up, or does not go as it should.
    """
    bind = ("--bind", f"{scheme}://{HOST}:{PORT}", "--name", NAME)
    with ExitStack() as undo:
        pid = _start(("run", "--demo", *options, *bind, *_PATIENT), log)
        undo.callback(_kill, pid)
        pidfd = os.pidfd_open(pid)
        undo.callback(os.close, pidfd)
        _wait_ready(pidfd)
        yield
        _stop(pid, pidfd)


def _start(arguments: Sequence[str], log: Path) -> int:
    """`steer` with these arguments, in a session of its own; returns its process id."""
    pid = os.fork()
    return pid or _be_steer(arguments, log)


def _be_steer(arguments: Sequence[str], log: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.argv = ["steer", *arguments]
        command.main()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    finally:
        os._exit(code)


def _wait_ready(pidfd: int) -> None:
    end_s = time.monotonic() + _READY_S
    while not _is_ready():
        if wait_for_end(pidfd, _LOOK_AGAIN_S):
            raise Broken("ended before it was ready")
        if time.monotonic() > end_s:
            raise Broken(f"not ready in {_READY_S:g} s")
    # The last is chosen when the service is done with what made it ready.
    status()


def _is_ready() -> bool:
    with suppress(ControlError):
        return all(each.state == "ready" for each in status().workers)
    return False


def _stop(pid: int, pidfd: int) -> None:
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    if not wait_for_end(pidfd, _END_S):
        raise Broken(f"did not end in {_END_S:g} s")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise Broken(how_it_ended(code))
    end_s = time.monotonic() + _GONE_S
    while left := _session(pid):
        if time.monotonic() > end_s:
            raise Broken(f"processes left behind: {left}")
        time.sleep(_LOOK_AGAIN_S)


def _kill(pid: int) -> None:
    """Whatever is left of it, so that it does not stand in the way of the next."""
    for each in _session(pid):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _session(number: int) -> list[int]:
    """The processes of a session that run (proc_pid_stat(5))."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            stat = Path(f"/proc/{name}/stat").read_text()
            state, _, _, session = stat.rpartition(")")[2].split()[:4]
            if int(session) == number and state not in "ZX":
                found.append(int(name))
    return found


def last_words(log: Path) -> str:
    with suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_WORDS:])
    return ""
