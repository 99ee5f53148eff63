"""What tests share: waiting, clients, a service in a process of its own, a network namespace."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from steer.control import client
from steer.errors import ControlError
from steer.linux import activity
from steer.loader import libbpf

DEADLINE_S = 60.0
"""For what should happen at once: long, as the machine may be busy with other things."""
STEER = str(Path(sys.executable).parent / "steer")
NOBODY = 65534
T = TypeVar("T")
_TRUE = object()


class HasFileno(Protocol):
    def fileno(self) -> int: ...


def eventually(ask: Callable[[], T], wanted: object = _TRUE, timeout_s: float = DEADLINE_S) -> T:
    """What `ask` answers once it is `wanted`, or once it is true.

    Loopback needs it too: ksoftirqd may deliver after the sender's call returned.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        found = ask()
        if found if wanted is _TRUE else found == wanted:
            return found
        assert time.monotonic() < end_s, f"still {found!r} after {timeout_s:g} s"
        time.sleep(0.01)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """By SIGSTOP, all of them, before it begins."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: all(map(activity.is_stopped, pids)))
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def is_ready(what: HasFileno | int, within_s: float = 0.0, event: int = select.POLLIN) -> bool:
    """Whether there is, within that time, something to read; with POLLOUT, room to write."""
    poll = select.poll()
    poll.register(what, event)
    return bool(poll.poll(1000 * max(0.0, within_s)))


# Processes


@contextmanager
def running(
    *argv: str, fds: Sequence[int] = (), cwd: Path | None = None, stderr: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """A process and the family it starts, all ended afterwards; it has `fds` open."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        pass_fds=fds,
        cwd=cwd,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def python(code: str, *arguments: object) -> tuple[str, ...]:
    """The command that runs it."""
    return (sys.executable, "-c", code, *map(str, arguments))


def line_of(process: subprocess.Popen[str]) -> str:
    """The next that it prints; waits for it."""
    assert process.stdout
    return process.stdout.readline().strip()


def is_running(pid: int) -> bool:
    """Orphans that have ended may stay as zombies where the first process is no init."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open, as /proc shows it; without what it closes meanwhile."""
    found = {}
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[int(each.name)] = os.readlink(each)
    return found


def channel_of(pid: int) -> str:
    """Its end of its channel to the controller, as /proc shows it."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    sequential = {f"socket:[{line.split()[6]}]" for line in lines if line.split()[4] == "0005"}
    (found,) = sequential & set(descriptors(pid).values())
    return found


# Network namespaces


def tcp_count(name: str) -> int:
    """One of netstat(8)'s, of this thread's network namespace."""
    names, values = Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2]
    return int(dict(zip(names.split(), values.split(), strict=True))[name])


_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41


class Netns:
    """The network namespace a test is in: nobody else's ports, and sysctls to play with."""

    def sysctl(self, name: str, value: object) -> None:
        """Set a sysctl of this namespace: net.ipv4.tcp_syncookies."""
        Path("/proc/sys", *name.split(".")).write_text(str(value))


@contextmanager
def network_namespace() -> Iterator[Netns]:
    """Be in a new network namespace, with the loopback up.

    This process itself goes there and comes back, so a test reads as if it were alone on
    the machine: its own sockets and every process it starts are in there. setns(2) goes by
    the thread, and pytest has but one. Entering takes a millisecond, a process to send
    commands to would take 50; with the last socket and process in it the namespace is gone.
    """
    with this_network_namespace() as old:
        if _LIBC.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP_RUNNING))
            yield Netns()
        finally:
            _enter(old)


@contextmanager
def this_network_namespace() -> Iterator[int]:
    """A descriptor of the one that we are in."""
    fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def in_network_namespace(fd: int) -> Iterator[None]:
    """Be in another one. Sockets that are made there stay there."""
    with this_network_namespace() as before:
        _enter(fd)
        try:
            yield
        finally:
            _enter(before)


def _enter(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
        pytest.exit(f"setns: {os.strerror(ctypes.get_errno())}: all to come would be lost")


# Terminals


class Terminal:
    """A command on a terminal of its own.

    Args:
        size: rows and columns.
    """

    def __init__(
        self, *command: str, environment: Mapping[str, str], size: tuple[int, int] = (50, 160)
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        self.process = subprocess.Popen(
            command,
            env={**environment, "TERM": "xterm"},
            preexec_fn=lambda: os.login_tty(slave),
            pass_fds=[slave],
        )
        os.close(slave)
        self.shown = ""

    def read_until(self, done: Callable[[str], object]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not done(self.shown):
            assert is_ready(self._master, end_s - time.monotonic()), self.shown
            try:
                self.shown += os.read(self._master, 65536).decode()
            except OSError:  # EIO: nobody has the other end any more
                assert done(self.shown), self.shown

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


# Clients


def http_get(
    host: str, port: int, target: str = "/", source: str = ""
) -> tuple[dict[str, str], dict[str, Any]]:
    """One request in a connection of its own: header fields by lower-case name, and the JSON.

    Args:
        source: address to come from; any if not given.
    """
    here = (source, 0) if source else None
    with socket.create_connection((host, port), DEADLINE_S, here) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        with sock.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    fields = (line.partition(": ") for line in head.decode().split("\r\n")[1:])
    return {name.lower(): value for name, _, value in fields}, json.loads(body)


def udp_ask(host: str, port: int, data: bytes = b"") -> dict[str, Any]:
    """One datagram from a socket of its own, and the answer's JSON."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect((host, port))
        sock.send(data)
        answer: dict[str, Any] = json.loads(sock.recv(65536))
        return answer


# What a service leaves behind


def session(number: int) -> list[int]:
    """The processes of a session that are not yet gone."""
    return [pid for pid in _pids() if _session_of(pid) == number]


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _session_of(pid: int) -> int | None:
    """None of a process that has ended, also of one nobody has waited for."""
    try:
        state, _, _, of, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(of)


def bpf_ids(pid: int) -> set[tuple[str, int]]:
    """The programs and maps that a process has open: ("prog", 7), ("map", 3)."""
    found = set()
    with suppress(OSError):
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(OSError):
                for line in info.read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name in ("prog_id", "map_id"):
                        found.add((name.removesuffix("_id"), int(value)))
    return found


def bpf_exists(kind: str, number: int) -> bool:
    """Whether a program or map is still there; numbers are not used again for long."""
    fd = getattr(libbpf.libbpf(), f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    if fd >= 0:
        os.close(fd)
    return fd != -errno.ENOENT


# Services


@dataclass
class Service:
    """`steer run` in a process of its own.

    Args:
        home: directory it runs in, with its run and cache directories.
        records: directory of what it writes.
        environment: what `steer` commands that speak to it need.
    """

    process: subprocess.Popen[bytes]
    name: str
    home: Path
    records: Path
    environment: Mapping[str, str]
    _bpf: set[tuple[str, int]] = field(default_factory=set)

    @property
    def pid(self) -> int:
        """Of the controller."""
        return self.process.pid

    @property
    def control_socket(self) -> Path:
        return self.home / "run" / "steer" / f"{self.name}.sock"

    @property
    def log(self) -> str:
        """What it and its workers wrote to standard error so far."""
        return (self.records / "stderr").read_text(errors="replace")

    @property
    def output(self) -> str:
        """What it and its workers wrote to standard output so far."""
        return (self.records / "stdout").read_text(errors="replace")

    def ask(self, command: str, **more: Any) -> dict[str, Any]:
        """Send a request to its control socket. Raises ControlError."""
        return client.ask(self.control_socket, command, **more)

    def status(self) -> dict[str, Any]:
        """What it says of itself; queue lengths are not in it, as `steer status` adds them."""
        status: dict[str, Any] = self.ask("status")["service"]
        return status

    def workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.status()["workers"]
        return workers

    def selected(self) -> dict[int, int]:
        """Connections (UDP: datagrams) by slot."""
        return {each["slot"]: each["connections"]["selected"] for each in self.workers()}

    def steer(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another `steer` command where it finds this service."""
        return run_steer(*arguments, environment=self.environment, cwd=self.home)

    def wait_ready(self, workers: int | None = None) -> Service:
        """Until `workers`, or all, are ready. Fails at once if the service ends before."""

        def ready() -> bool:
            assert self.process.poll() is None, f"exit {self.process.returncode}\n{self.log}"
            with suppress(ControlError):
                status = self.status()
                states = [each["state"] for each in status["workers"]]
                wanted = len(states) if workers is None else workers
                return status["state"] == "running" and states.count("ready") >= wanted > 0
            return False

        eventually(ready)
        # A worker is reported ready in the turn of the loop before the one that flips the
        # table for it: once a second request is answered, it is chosen.
        self.status()
        self._note_bpf()
        return self

    def wait_asked(self) -> dict[str, Any]:
        """Until it answers, whether any worker is ready or not; what it says then."""

        def answer() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"exit {self.process.returncode}\n{self.log}"
            with suppress(ControlError):
                return self.status()
            return None

        found = eventually(answer)
        assert found is not None
        return found

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Its exit status, negative for the signal that ended it."""
        return self.process.wait(timeout_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit status."""
        self._note_bpf()
        self.send_signal(number)
        return self.wait()

    def leaves_nothing(self) -> None:
        """Once it has ended: no process, program, map or control socket is left of it."""
        eventually(lambda: session(self.pid), [])
        eventually(lambda: [each for each in self._bpf if bpf_exists(*each)], [])
        if self.process.returncode != -signal.SIGKILL:
            assert not self.control_socket.exists()

    def end(self) -> None:
        """Stop it if it still runs. Raises TimeoutExpired if it had to be killed."""
        try:
            if self.process.poll() is None:
                self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def clean_up(self) -> None:
        """End it; see that nothing is left, and do not leave it to others."""
        try:
            self.end()
            self.leaves_nothing()
        finally:
            for pid in session(self.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def _note_bpf(self) -> None:
        self._bpf |= bpf_ids(self.pid)


def as_user(uid: int | None, *command: str) -> list[str]:
    """The command as another user, with no capability and none to be had."""
    if uid is None:
        return list(command)
    drop = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all")
    return ["setpriv", *drop, "--inh-caps=-all", "--", *command]


def lose_directory(running: Service) -> None:
    """Remove its run directory, at once: the control socket may be made again meanwhile."""
    gone = running.home / f"gone-{time.monotonic_ns()}"
    running.control_socket.parent.rename(gone)
    shutil.rmtree(gone)


DOCKER_CAPABILITIES = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"),
)


def setpriv(*held: str) -> tuple[str, ...]:
    """Executes a command as root with no capabilities but these."""
    bounding = ",".join(["-all", *(f"+{name}" for name in held)])
    return ("setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", "--")


AS_IN_DOCKER = setpriv(*DOCKER_CAPABILITIES)
"""Executes a command as root with the capabilities that Docker gives by default."""

_REFUSE = """
import ctypes, os, struct, sys
calls, action, command = sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3:]
ALLOW = 0x7FFF0000
code = [(0x20, 0, 0, 0)]  # the number
for number in calls:
    code += [(0x15, 0, 1, int(number)), (0x06, 0, 0, action)]
code += [(0x06, 0, 0, ALLOW)]
insns = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(insns)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP
os.execvp(command[0], command)
"""
PIDFD_GETFD = 438


def refusing(*calls: int) -> tuple[str, ...]:
    """Executes a command whose system calls of these numbers fail with EPERM (seccomp(2))."""
    return _filtered(calls, 0x00050000 | errno.EPERM)


def killing(*calls: int) -> tuple[str, ...]:
    """Executes a command that these system calls end, as systemd's SystemCallFilter= does."""
    return _filtered(calls, 0x80000000)


def _filtered(calls: Iterable[int], action: int) -> tuple[str, ...]:
    return (sys.executable, "-c", _REFUSE, ",".join(map(str, calls)), str(action))


_WOUND = """
import importlib, sys
from ast import literal_eval
count = int(sys.argv[1])
for each in sys.argv[2 : 2 + count]:
    (where, _, value) = each.partition("=")
    (module, _, name) = where.rpartition(".")
    module = importlib.import_module(module)
    assert hasattr(module, name), where
    setattr(module, name, literal_eval(value))
sys.argv = sys.argv[2 + count :]
from steer.__main__ import main
sys.exit(main())
"""


def wound(*constants: str) -> tuple[str, ...]:
    """Has a `steer` command go by other times than its own, as "steer.health.split._AGAIN_S=1.0"."""
    return (sys.executable, "-c", _WOUND, str(len(constants)), *constants)


_REFUSE_NETLINK = """
import ctypes, struct, sys, os, errno
code = [(0x20, 0, 0, 0), (0x15, 0, 3, 41), (0x20, 0, 0, 16), (0x15, 0, 1, 16),
        (0x06, 0, 0, 0x00050000 | errno.EAFNOSUPPORT), (0x06, 0, 0, 0x7FFF0000)]
insns = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(insns)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
WITHOUT_NETLINK = (sys.executable, "-c", _REFUSE_NETLINK)
"""Executes a command that can make no netlink socket, as by RestrictAddressFamilies=."""


def clean_environment(home: Path) -> dict[str, str]:
    """Nothing that would configure steer, but for the demo, which may run without being asked for
    in each test; and its directories, in `home`."""
    unwanted = ("STEER_", "LISTEN_", "NOTIFY_SOCKET", "WEB_CONCURRENCY", "XDG_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {
        **kept,
        "STEER_DEMO": "true",
        "STEER_RUNTIME_DIR": str(home / "run" / "steer"),
        "XDG_RUNTIME_DIR": str(home / "run"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_steer(
    *arguments: str,
    environment: Mapping[str, str],
    cwd: Path,
    user: int | None = None,
    timeout_s: float = DEADLINE_S,
) -> subprocess.CompletedProcess[str]:
    """A `steer` command, to its end."""
    return subprocess.run(
        as_user(user, STEER, *arguments),
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def launch(
    command: Sequence[str], *, environment: Mapping[str, str], home: Path, records: Path
) -> subprocess.Popen[bytes]:
    """A command in a session of its own, that writes to `stdout` and `stderr` in `records`."""
    with (records / "stdout").open("wb") as out, (records / "stderr").open("wb") as err:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def start_service(
    *arguments: str,
    name: str,
    environment: Mapping[str, str],
    home: Path,
    user: int | None = None,
    under: Sequence[str] = (),
) -> Service:
    """`steer run ARGUMENTS`, in a session of its own; not yet ready."""
    records = Path(tempfile.mkdtemp(prefix="records-", dir=home))
    command = [*under, *as_user(user, STEER, "run", "--name", name, *arguments)]
    process = launch(command, environment=environment, home=home, records=records)
    return Service(process, name, home, records, environment)
