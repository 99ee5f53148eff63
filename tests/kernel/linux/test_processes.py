"""What /proc tells: on real processes and servers, and on made trees for other kernels."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from steer.linux import activity, port_holders, processes
from steer.linux.waiting import Seen, acceptors, in_event_loop, waits_on, waits_on_each
from testkit import ROOT
from testkit.processes import eventually, line_of, python, running
from testkit.programs import source


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def inodes_of(*sockets: socket.socket) -> frozenset[int]:
    return frozenset(processes.socket_inode(each.fileno()) for each in sockets)


# ---- families

FAMILY = """
import os, signal
if not os.fork():
    if not os.fork():
        print(os.getpid(), flush=True)
    signal.pause()
signal.pause()
"""


@contextmanager
def three_generations() -> Iterator[list[int]]:
    """A process, its child and its grandchild."""
    with running(*python(FAMILY)) as process:
        grandchild = int(line_of(process))
        child = int(Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[1])
        yield [process.pid, child, grandchild]


def test_descendants_are_the_process_its_child_and_grandchild() -> None:
    with three_generations() as family:
        assert processes.descendants(family[0]) == family
        assert processes.descendants(family[1]) == family[1:]
        assert processes.descendants(os.getpid())[0] == os.getpid()
        assert set(family) <= set(processes.descendants(os.getpid()))


def test_descendants_without_config_proc_children(tmp_path: Path) -> None:
    with three_generations() as family:
        for pid in [*family, os.getpid()]:
            (tmp_path / str(pid)).mkdir()
            (tmp_path / str(pid) / "stat").symlink_to(f"/proc/{pid}/stat")
        assert processes.descendants(family[0], str(tmp_path)) == family
        assert processes.descendants(os.getpid(), str(tmp_path)) == [os.getpid(), *family]


def test_descendants_of_a_child_of_a_thread() -> None:
    code = """
import os, signal, threading
def fork():
    if not os.fork():
        print(os.getpid(), flush=True)
        signal.pause()
    signal.sigwait([signal.SIGUSR1])
threading.Thread(target=fork).start()
"""
    with running(*python(code)) as process:
        child = int(line_of(process))
        assert processes.descendants(process.pid) == [process.pid, child]


def test_descendants_of_nobody(ended_pid: int) -> None:
    assert processes.descendants(ended_pid) == []


def test_lineage() -> None:
    with three_generations() as (first, second, third):
        assert processes.lineage(third)[:4] == (third, second, first, os.getpid())
        assert {os.getpgid(third), os.getsid(third)} <= set(processes.lineage(third))
        assert third not in processes.lineage(first)


def test_lineage_of_nobody(ended_pid: int) -> None:
    assert processes.lineage(ended_pid) == (ended_pid,)


def test_arguments(ended_pid: int) -> None:
    with running("cat", "-", "") as process:
        eventually(lambda: processes.arguments(process.pid), ["cat", "-", ""])
    assert processes.arguments(ended_pid) == []


@pytest.fixture
def ended_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_command_with_spaces_and_brackets(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "stat").write_text("12 (a) R 1 (b) S 7 " + " ".join(map(str, range(5, 53))))
    assert processes.parent(12, str(tmp_path)) == 7
    assert processes.start_time_ticks(12, str(tmp_path)) == 22


def test_start_time(ended_pid: int) -> None:
    boot_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
    with running("cat") as process:
        started = processes.start_time_ticks(process.pid)
        assert started is not None
        assert started >= int(boot_ticks)
        assert processes.start_time_ticks(process.pid) == started
    assert processes.start_time_ticks(ended_pid) is None


# ---- open sockets


def test_open_sockets_of_a_family(listener: socket.socket, datagrams: socket.socket) -> None:
    code = """
import os, signal, socket, sys
mine, other = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:])
if os.fork():
    other.close()
    signal.pause()
mine.close()
print("here", flush=True)
signal.pause()
"""
    fds = (listener.fileno(), datagrams.fileno())
    with running(*python(code, *map(str, fds)), fds=fds) as process:
        assert line_of(process) == "here"
        eventually(lambda: len(list(processes.sockets_by_fd(process.pid))), 1)
        assert processes.open_sockets(process.pid) == inodes_of(listener, datagrams)
        (entry,) = processes.sockets_by_fd(process.pid)
        assert entry == (fds[0], *inodes_of(listener))


def test_connections_are_open_sockets(listener: socket.socket) -> None:
    before = processes.open_sockets(os.getpid())
    with socket.create_connection(listener.getsockname()) as client:
        assert processes.open_sockets(os.getpid()) == before | inodes_of(client)
        accepted, _ = listener.accept()
        with accepted:
            assert processes.open_sockets(os.getpid()) == before | inodes_of(client, accepted)
    assert processes.open_sockets(os.getpid()) == before


def test_nobody_has_open_sockets(ended_pid: int) -> None:
    assert processes.open_sockets(ended_pid) == set()
    with subprocess.Popen(["true"]) as process:
        eventually(lambda: state(process.pid), "Z")
        assert processes.open_sockets(process.pid) == set()


@pytest.mark.needs("root")
def test_open_sockets_of_another_user(listener: socket.socket) -> None:
    look = """
import os, sys
from steer.errors import KernelError
from steer.linux import processes as proc
from steer.linux import waiting as waits
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(proc.open_sockets(int(sys.argv[1])))
except KernelError as error:
    print(error)
"""
    with running(*python(look, str(os.getpid()))) as looker:
        assert line_of(looker) == (
            f"look at the open files of pid {os.getpid()}: EACCES; run as root, or as its user"
        )


@pytest.mark.needs("root")
def test_a_zombie_that_may_not_be_looked_at_has_none() -> None:
    """Not even by its parent, unless that is root."""
    look = """
import os
from steer.linux import processes as proc
from steer.linux import waiting as waits
os.setgroups([]); os.setgid(65534); os.setuid(65534)
child = os.fork() or os._exit(0)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
try:
    os.listdir(f"/proc/{child}/fd")
except PermissionError:
    print(proc.open_sockets(child))
"""
    with running(*python(look)) as looker:
        assert line_of(looker) == "set()"


# ---- signs of life

BUSY = "while True: pass"
WAITS_FOR_LINES = "import sys\nprint('here', flush=True)\nfor _ in sys.stdin: pass"
IN_A_CHILD = """
import os, signal
if os.fork():
    signal.pause()
print(os.getpid(), flush=True)
"""
IN_A_THREAD = """
import signal, threading, time
def run():
    while True: time.sleep(0.01)
threading.Thread(target=run).start()
print("here", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(
    "code", [BUSY, IN_A_CHILD + BUSY, IN_A_THREAD], ids=["busy", "child", "thread"]
)
def test_activity_of_one_that_runs(code: str) -> None:
    with running(*python(code)) as process:
        for _ in range(3):
            before = activity.activity(process.pid)
            eventually(lambda: activity.activity(process.pid) != before)  # noqa: B023


def test_activity_of_one_that_waits() -> None:
    with running(*python(WAITS_FOR_LINES)) as process:
        assert line_of(process) == "here"
        eventually(lambda: state(process.pid), "S")
        before = activity.activity(process.pid)
        time.sleep(0.05)
        assert activity.activity(process.pid) == before
        assert process.stdin
        process.stdin.write("something\n")
        process.stdin.flush()
        eventually(lambda: activity.activity(process.pid) > before)


def test_activity_of_one_that_is_stopped() -> None:
    with running(*python(BUSY)) as process:
        os.kill(process.pid, signal.SIGSTOP)
        eventually(lambda: activity.is_stopped(process.pid))
        before = activity.activity(process.pid)
        time.sleep(0.05)
        assert activity.activity(process.pid) == before
        assert not activity.is_runnable(process.pid)
        os.kill(process.pid, signal.SIGCONT)
        eventually(lambda: activity.activity(process.pid) != before)
        assert not activity.is_stopped(process.pid)


def test_one_that_waits_for_a_cpu_is_runnable() -> None:
    """Three on one CPU: two wait for it, and none sleeps."""
    cpu = min(os.sched_getaffinity(0))
    with ExitStack() as there:
        spinning = [there.enter_context(running(*python(BUSY))) for _ in range(3)]
        for each in spinning:
            os.sched_setaffinity(each.pid, {cpu})
        eventually(lambda: all(activity.is_runnable(each.pid) for each in spinning))
    with three_generations() as family:
        eventually(lambda: not activity.is_runnable(family[0]))


def test_nobody_is_active_or_stopped(ended_pid: int) -> None:
    assert not activity.is_runnable(ended_pid)
    assert activity.activity(ended_pid) == 0
    assert not activity.is_stopped(ended_pid)


def test_stopped_is_any_of_the_family() -> None:
    with three_generations() as family:
        for pid in family:
            assert not activity.is_stopped(family[0])
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda: activity.is_stopped(family[0]))
            os.kill(pid, signal.SIGCONT)
            eventually(lambda: not activity.is_stopped(family[0]))


STATES = {"TT": True, "Tt": True, "TS": False, "ZT": True, "ZZ": False, "Z": False, "": False}


@pytest.mark.parametrize("states, stopped", STATES.items())
def test_stopped_is_all_threads(tmp_path: Path, states: str, stopped: bool) -> None:
    (tmp_path / "7" / "task").mkdir(parents=True)
    for tid, each in enumerate(states, 7):
        (tmp_path / "7" / "task" / str(tid)).mkdir()
        stat = tmp_path / "7" / "task" / str(tid) / "stat"
        stat.write_text(f"{tid} (a b) {each} 1 " + "0 " * 48)
    assert activity.is_stopped(7, str(tmp_path)) == stopped


# ---- waiting on a socket

SOCKET = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\n"
BESIDE = SOCKET + "other = socket.create_server(('127.0.0.1', 0))\n"

WAITS = {
    "accept": "s.accept()",
    "accept with a timeout": "s.settimeout(1000); s.accept()",
    "poll": "import select; p = select.poll(); p.register(s, select.POLLIN); p.poll()",
    "select": "import select; select.select([s], [], [])",
    "select with a timeout": "import select; select.select([s], [], [], 1000)",
    "epoll": "import select; e = select.epoll(); e.register(s, select.EPOLLIN); e.poll()",
    "poll of an epoll": """
import select
e, p = select.epoll(), select.poll()
e.register(s, select.EPOLLIN)
p.register(e, select.POLLIN)
p.poll()""",
    "one of several polled": """
import select
p, other = select.poll(), socket.create_server(('127.0.0.1', 0))
for each in (other, s, sys.stdin):
    p.register(each, select.POLLIN)
p.poll()""",
    "socketserver": """
import socketserver
server = socketserver.TCPServer(s.getsockname(), None, bind_and_activate=False)
server.socket = s
server.serve_forever()""",
    "asyncio": """
import asyncio
async def serve():
    server = await asyncio.start_server(lambda r, w: None, sock=s)
    await server.serve_forever()
asyncio.run(serve())""",
    "a thread": """
import signal, threading
threading.Thread(target=s.accept).start()
signal.pause()""",
    "a child": """
import os, signal
os.fork() or s.accept()
signal.pause()""",
    "a grandchild": """
import os, signal
os.fork() or os.fork() or s.accept()
signal.pause()""",
    "an epoll inherited from the parent": """
import os, select, signal
e = select.epoll()
e.register(s, select.EPOLLIN)
os.fork() or e.poll()
signal.pause()""",
    "under another number": "import os; n = os.dup(s.fileno()); socket.socket(fileno=n).accept()",
}

WAITS_FOR_DATAGRAMS = {
    "recvfrom": "s.recvfrom(100)",
    "recvmsg": "s.recvmsg(100)",
    "read": "import os; os.read(s.fileno(), 100)",
    "recvfrom with a timeout": "s.settimeout(1000); s.recvfrom(100)",
    "recvmmsg": """
import ctypes
class iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_char_p), ("len", ctypes.c_size_t)]
message = (ctypes.c_char * 64)()
ctypes.CDLL(None).recvmmsg(s.fileno(), message, 1, 0, None)""",
    "asyncio": """
import asyncio
async def serve():
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(asyncio.DatagramProtocol, sock=s)
    await loop.create_future()
asyncio.run(serve())""",
}

# each ends in a wait for something else
DOES_NOT_WAIT = {
    "sleeps": "signal.pause()",
    "accepts on another": "other.accept()",
    "polls another": "p = select.poll(); p.register(other, select.POLLIN); p.poll()",
    "polls for room to write": "p = select.poll(); p.register(s, select.POLLOUT); p.poll()",
    "selects another": "select.select([other], [], [])",
    "selects for room to write": "select.select([], [s], [])",
    "waits on an epoll without it": """
e = select.epoll(); e.register(other, select.EPOLLIN); e.poll()""",
    "has registered it and goes on starting up": """
e = select.epoll(); e.register(s, select.EPOLLIN); signal.pause()""",
    "has registered it with another epoll": """
e = select.epoll(); e.register(s, select.EPOLLIN)
f = select.epoll(); f.register(other, select.EPOLLIN); f.poll()""",
    "waits on a pipe": "os.read(os.pipe()[0], 1)",
}


@pytest.mark.parametrize("code", WAITS.values(), ids=WAITS.keys())
def test_waits_on_a_listener(listener: socket.socket, code: str) -> None:
    with running(*python(SOCKET + code, str(listener.fileno())), fds=(listener.fileno(),)) as it:
        eventually(lambda: waits_on(it.pid, inodes_of(listener)), Seen.YES)


@pytest.mark.parametrize("code", WAITS_FOR_DATAGRAMS.values(), ids=WAITS_FOR_DATAGRAMS.keys())
def test_waits_on_a_udp_socket(datagrams: socket.socket, code: str) -> None:
    with running(*python(SOCKET + code, str(datagrams.fileno())), fds=(datagrams.fileno(),)) as it:
        eventually(lambda: waits_on(it.pid, inodes_of(datagrams)), Seen.YES)


@pytest.mark.parametrize("code", DOES_NOT_WAIT.values(), ids=DOES_NOT_WAIT.keys())
def test_has_a_listener_but_does_not_wait_on_it(listener: socket.socket, code: str) -> None:
    code = f"{BESIDE}import os, select, signal\nprint('here', flush=True)\n{code}"
    with running(*python(code, str(listener.fileno())), fds=(listener.fileno(),)) as process:
        assert line_of(process) == "here"
        eventually(lambda: state(process.pid), "S")
        assert waits_on(process.pid, inodes_of(listener)) is Seen.NO


def test_waits_on_one_of_several(listener: socket.socket, datagrams: socket.socket) -> None:
    code, number = SOCKET + "s.accept()", listener.fileno()
    with running(*python(code, str(number)), fds=(number,)) as it:
        eventually(lambda: waits_on(it.pid, inodes_of(listener, datagrams)), Seen.YES)
        assert waits_on(it.pid, inodes_of(datagrams)) is Seen.NO
        assert waits_on(it.pid, frozenset()) is Seen.NO


def test_each_of_several_is_told_apart(listener: socket.socket, datagrams: socket.socket) -> None:
    code, number = SOCKET + "s.accept()", listener.fileno()
    waited_on, other = inodes_of(listener), inodes_of(datagrams)
    wanted = {**dict.fromkeys(waited_on, Seen.YES), **dict.fromkeys(other, Seen.NO)}
    with running(*python(code, str(number)), fds=(number,)) as it:
        eventually(lambda: waits_on_each(it.pid, waited_on | other), wanted)


def test_listeners_that_different_threads_wait_on_are_all_found() -> None:
    code = """
import socket, threading, signal
them = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
for each in them[1:]:
    threading.Thread(target=each.accept, daemon=True).start()
print(*(os.fstat(each.fileno()).st_ino for each in them), flush=True)
signal.pause()
"""
    with running(*python("import os" + code)) as it:
        idle, *busy = map(int, line_of(it).split())
        wanted = {idle: Seen.NO, **dict.fromkeys(busy, Seen.YES)}
        eventually(lambda: waits_on_each(it.pid, frozenset(wanted)), wanted)


def test_nobody_waits(listener: socket.socket, ended_pid: int) -> None:
    assert waits_on(ended_pid, inodes_of(listener)) is Seen.NO


def test_a_zombie_does_not_wait(listener: socket.socket) -> None:
    with subprocess.Popen(["true"]) as process:
        eventually(lambda: state(process.pid), "Z")
        assert waits_on(process.pid, inodes_of(listener)) is Seen.NO
        assert waits_on(process.pid, inodes_of(listener), machine="pdp11") is Seen.NO


def test_wait_that_ends_is_no_longer_seen(listener: socket.socket) -> None:
    code = SOCKET + "import signal; s.accept(); signal.pause()"
    with running(*python(code, str(listener.fileno())), fds=(listener.fileno(),)) as process:
        eventually(lambda: waits_on(process.pid, inodes_of(listener)), Seen.YES)
        with socket.create_connection(listener.getsockname()):
            eventually(lambda: waits_on(process.pid, inodes_of(listener)), Seen.NO)


@pytest.mark.needs("root")
def test_a_process_of_another_user_cannot_be_looked_at(listener: socket.socket) -> None:
    """The looker imports before it becomes nobody, who may not read this checkout."""
    look = """
import os, sys
from steer.linux import processes as proc
from steer.linux import waiting as waits
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(waits.waits_on(int(sys.argv[1]), frozenset({int(sys.argv[2])})).name)
"""
    code, (inode,) = SOCKET + "s.accept()", inodes_of(listener)
    with running(*python(code, str(listener.fileno())), fds=(listener.fileno(),)) as process:
        eventually(lambda: waits_on(process.pid, frozenset({inode})), Seen.YES)
        with running(*python(look, str(process.pid), str(inode))) as looker:
            assert line_of(looker) == "UNKNOWN"


# ---- waiting, where system call numbers are not known


def test_unknown_machine_takes_registration_for_waiting(listener: socket.socket) -> None:
    code = SOCKET + "import select; e = select.epoll(); e.register(s, select.EPOLLIN); e.poll()"
    with running(*python(code, str(listener.fileno())), fds=(listener.fileno(),)) as it:
        eventually(lambda: waits_on(it.pid, inodes_of(listener), machine="pdp11"), Seen.YES)


def test_unknown_machine_cannot_tell_of_accept(listener: socket.socket) -> None:
    code = SOCKET + "s.accept()"
    with running(*python(code, str(listener.fileno())), fds=(listener.fileno(),)) as it:
        eventually(lambda: waits_on(it.pid, inodes_of(listener)), Seen.YES)
        assert waits_on(it.pid, inodes_of(listener), machine="pdp11") is Seen.UNKNOWN


def task(at: Path, syscall: str, memory: bytes = b"", fdinfo: dict[int, str] | None = None) -> None:
    """A made process 7 whose descriptor 3 is socket 100 and 4 an epoll."""
    made = at / "7" / "task" / "7"
    (made / "fd").mkdir(parents=True)
    (made / "fdinfo").mkdir()
    (made / "children").write_text("")
    (made / "syscall").write_text(syscall)
    (made / "mem").write_bytes(memory)
    (made / "fd" / "3").symlink_to("socket:[100]")
    (made / "fd" / "4").symlink_to("anon_inode:[eventpoll]")
    for fd, text in (fdinfo or {}).items():
        (made / "fdinfo" / str(fd)).write_text(text)


EPOLL_OF_100 = "pos:\t0\ntfd:        3 events:       19 data:     3  pos:0 ino:64 sdev:9\n"
POLLFD = struct.pack("=ihhihh", 9, 1, 0, 3, 1, 0)
FD_SET = (1 << 3).to_bytes(128, "little")

CALLS = {
    "aarch64 accept": ("aarch64", "202 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "aarch64 accept4": ("aarch64", "242 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "aarch64 recvfrom": ("aarch64", "207 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "aarch64 epoll_pwait": ("aarch64", "22 0x4 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "aarch64 ppoll": ("aarch64", "73 0x10 0x2 0x0 0x0 0x0 0x0 0x1 0x2", bytes(16) + POLLFD),
    "aarch64 pselect6": ("aarch64", "72 0x4 0x10 0x0 0x0 0x0 0x0 0x1 0x2", bytes(16) + FD_SET),
    "riscv64 accept4": ("riscv64", "242 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "x86_64 accept": ("x86_64", "43 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "x86_64 select": ("x86_64", "23 0x4 0x10 0x0 0x0 0x0 0x0 0x1 0x2", bytes(16) + FD_SET),
    "x86_64 epoll_pwait2": ("x86_64", "441 0x4 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "upper half of an int": ("x86_64", "43 0xdeadbeef00000003 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
}


@pytest.mark.parametrize(("machine", "syscall", "memory"), CALLS.values(), ids=CALLS.keys())
def test_system_calls(tmp_path: Path, machine: str, syscall: str, memory: bytes) -> None:
    task(tmp_path, syscall, memory, {4: EPOLL_OF_100})
    assert waits_on(7, frozenset({100}), str(tmp_path), machine) is Seen.YES
    assert waits_on(7, frozenset({101}), str(tmp_path), machine) is Seen.NO


QUIET = {
    "running": ("running\n", b""),
    "outside of a call": ("-1 0x7ffd 0x7f00\n", b""),
    "another call": ("230 0x3 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "a closed descriptor": ("43 0x5 0x0 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "a poll out of memory": ("7 0x10 0x2 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "a poll of a huge count": ("7 0x0 0xffffffff 0x0 0x0 0x0 0x0 0x1 0x2", b"\0" * 9),
    "a poll past any memory": ("7 0xffffffffffffffff 0x1 0x0 0x0 0x0 0x0 0x1 0x2", b""),
    "a select of no readers": ("23 0x4 0x0 0x0 0x0 0x0 0x0 0x1 0x2", FD_SET),
}


@pytest.mark.parametrize(("syscall", "memory"), QUIET.values(), ids=QUIET.keys())
def test_what_is_not_waiting(tmp_path: Path, syscall: str, memory: bytes) -> None:
    task(tmp_path, syscall, memory)
    assert waits_on(7, frozenset({100}), str(tmp_path), "x86_64") is Seen.NO


# ---- io_uring

RING = """
import ctypes, mmap, os, struct
libc = ctypes.CDLL(None, use_errno=True)
SETUP, ENTER, GETEVENTS, SQES = 425, 426, 1, 0x10000000
parameters = ctypes.create_string_buffer(120)
ring = libc.syscall(SETUP, 8, parameters)
if ring < 0:
    print(os.strerror(ctypes.get_errno()), flush=True)
    sys.exit()
_, tail, mask, _, _, _, array = struct.unpack_from("=7I", parameters, 40)
queue = mmap.mmap(ring, array + 32, offset=0)
entries = mmap.mmap(ring, 8 * 64, offset=SQES)
opcode, events = int(sys.argv[2]), int(sys.argv[3])
entries[:32] = struct.pack("=BBHiQQII", opcode, 0, 0, s.fileno(), 0, 0, 0, events)
queue[tail:tail + 4] = struct.pack("=I", 1)
print("here", flush=True)
libc.syscall(ENTER, ring, 1, 1, GETEVENTS, 0, 0)
"""


ACCEPT, POLL = ("13", "0"), ("6", "1")


@pytest.mark.parametrize(
    ("request_", "seen"), [(ACCEPT, Seen.YES), (POLL, Seen.UNKNOWN)], ids=["accept", "poll"]
)
def test_io_uring(listener: socket.socket, request_: tuple[str, str], seen: Seen) -> None:
    """A poll is not told apart from one of another socket."""
    fd = listener.fileno()
    with running(*python(SOCKET + RING, str(fd), *request_), fds=(fd,)) as process:
        answer = line_of(process)
        if answer != "here":
            pytest.skip(f"io_uring_setup: {answer}")
        eventually(lambda: waits_on(process.pid, inodes_of(listener)), seen)


RING_STATES = {
    "nothing pending": ("PollList:\nCqOverflowList:\n", "socket:[100]", Seen.NO),
    "accept": ("PollList:\n  op=13, task_works=0\n", "socket:[100]", Seen.YES),
    "receive": ("PollList:\n  op=27, task_works=0\n", "socket:[100]", Seen.UNKNOWN),
    "accept, on another": ("PollList:\n  op=13, task_works=0\n", "socket:[9]", Seen.UNKNOWN),
}


@pytest.mark.parametrize("flags", ["0x1", "0x11"], ids=["by descriptor", "by registered index"])
@pytest.mark.parametrize(("fdinfo", "held", "seen"), RING_STATES.values(), ids=RING_STATES.keys())
def test_ring_states(tmp_path: Path, flags: str, fdinfo: str, held: str, seen: Seen) -> None:
    ring = "0x5" if flags == "0x1" else "0x0"
    task(tmp_path, f"426 {ring} 0x0 0x1 {flags} 0x0 0x0 0x1 0x2", b"", {5: fdinfo})
    fd = tmp_path / "7/task/7/fd"
    (fd / "5").symlink_to("anon_inode:[io_uring]")
    (fd / "3").unlink()
    (fd / "3").symlink_to(held)
    assert waits_on(7, frozenset({100}), str(tmp_path), "x86_64") is seen


# ---- real servers

APPLICATION = source("waits_in_a_loop")

SERVERS = [
    pytest.param("uvicorn", "-m uvicorn --fd {fd} app:asgi", marks=pytest.mark.needs("uvicorn")),
    pytest.param(
        "hypercorn", "-m hypercorn -b fd://{fd} app:asgi", marks=pytest.mark.needs("hypercorn")
    ),
    pytest.param("sync", "-m gunicorn -b fd://{fd} app:wsgi", marks=pytest.mark.needs("gunicorn")),
    pytest.param(
        "gthread",
        "-m gunicorn -b fd://{fd} -k gthread --threads 2 app:wsgi",
        marks=pytest.mark.needs("gunicorn"),
    ),
]


@pytest.mark.parametrize(("server", "command"), SERVERS)
def test_servers(tmp_path: Path, listener: socket.socket, server: str, command: str) -> None:
    (tmp_path / "app.py").write_text(APPLICATION)
    fd = listener.fileno()
    argv = [sys.executable, *command.format(fd=fd).split()]
    with running(*argv, fds=(fd,), cwd=tmp_path) as process:
        eventually(lambda: waits_on(process.pid, inodes_of(listener)), Seen.YES)


@pytest.mark.needs("uvicorn")
def test_uvicorn_is_not_ready_before_its_application(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app.py").write_text(APPLICATION)
    monkeypatch.setenv("GATE", "1")
    fd = listener.fileno()
    argv = [sys.executable, *f"-m uvicorn --fd {fd} app:asgi".split()]
    with running(*argv, fds=(fd,), cwd=tmp_path) as process:
        assert line_of(process) == "starting up"
        eventually(lambda: state(process.pid), "S")
        assert waits_on(process.pid, inodes_of(listener)) is Seen.NO
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: waits_on(process.pid, inodes_of(listener)), Seen.YES)


# ---- who has a port

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def bound(
    stack: ExitStack,
    protocol: port_holders.Protocol,
    address: str,
    port: int = 0,
    only: bool = False,
) -> tuple[socket.socket, int]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = stack.enter_context(socket.socket(family, KINDS[protocol]))
    if only:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        made.bind((address, port))
    except OSError as error:
        pytest.skip(f"bind {address}: {error.strerror}")
    if protocol == "tcp":
        made.listen()
    return made, made.getsockname()[1]


OVERLAPS = [
    ("127.0.0.1", "127.0.0.1", True),
    ("127.0.0.1", "0.0.0.0", True),
    ("127.0.0.1", "", True),
    ("0.0.0.0", "127.0.0.1", True),
    ("0.0.0.0", "::", True),
    ("::", "127.0.0.1", True),
    ("::", "::1", True),
    ("::1", "::", True),
    ("::1", "::1%lo", True),
    ("::ffff:127.0.0.1", "127.0.0.1", True),
    ("127.0.0.1", "::ffff:127.0.0.1", True),
    ("127.0.0.1", "127.0.0.2", False),
    ("127.0.0.1", "::1", False),
    ("::1", "0.0.0.0", False),
    ("0.0.0.0", "::1", False),
]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("held", "asked", "found"), OVERLAPS)
def test_holder_of_an_overlapping_address(
    netns: object, protocol: port_holders.Protocol, held: str, asked: str, found: bool
) -> None:
    with ExitStack() as stack:
        made, port = bound(stack, protocol, held)
        mine = [
            holder
            for holder in port_holders.holders(protocol, asked, port)
            if holder.inode == processes.socket_inode(made.fileno())
        ]
        command = Path("/proc/self/comm").read_text().strip()
        shown = held.removeprefix("::ffff:")
        expected = port_holders.Holder(
            os.getpid(), command, os.getuid(), processes.socket_inode(made.fileno()), shown
        )
        assert mine == ([expected] if found else [])
        assert str(expected) == f"{command} (pid {os.getpid()})"


def test_every_process_that_shares_the_socket_holds_it(netns: object) -> None:
    with ExitStack() as stack:
        made, port = bound(stack, "tcp", "127.0.0.1")
        fd = made.fileno()
        process = stack.enter_context(running("cat", fds=(fd,)))
        eventually(lambda: Path(f"/proc/{process.pid}/comm").read_text(), "cat\n")
        found = {
            holder.pid: holder.command for holder in port_holders.holders("tcp", "127.0.0.1", port)
        }
        assert found.keys() == {os.getpid(), process.pid}
        assert found[process.pid] == "cat"


@pytest.mark.parametrize("order", [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
def test_the_same_address_comes_before_wildcards(netns: object, order: tuple[str, str]) -> None:
    with ExitStack() as stack:
        _, port = bound(stack, "udp", "::", only=True)
        for address in order:
            bound_with_reuse(stack, address, port)
        found = [holder.address for holder in port_holders.holders("udp", "127.0.0.1", port)]
        assert found == ["127.0.0.1", "0.0.0.0", "::"]


def bound_with_reuse(stack: ExitStack, address: str, port: int) -> None:
    made = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))


def test_another_port_or_protocol_is_not_held(netns: object) -> None:
    with ExitStack() as stack:
        made, port = bound(stack, "tcp", "127.0.0.1")
        inode = processes.socket_inode(made.fileno())
        others = [
            *port_holders.holders("udp", "127.0.0.1", port),
            *port_holders.holders("tcp", "127.0.0.1", 1),
        ]
        assert inode not in [holder.inode for holder in others]


def test_connections_hold_a_port_only_where_nothing_listens(netns: object) -> None:
    with ExitStack() as stack:
        made, port = bound(stack, "tcp", "127.0.0.1")
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        server, _ = made.accept()
        stack.enter_context(server)
        listening, accepted = (processes.socket_inode(each.fileno()) for each in (made, server))
        assert [each.inode for each in port_holders.holders("tcp", "127.0.0.1", port)] == [
            listening
        ]
        made.close()
        assert [each.inode for each in port_holders.holders("tcp", "127.0.0.1", port)] == [accepted]
        client_port = client.getsockname()[1]
        found = port_holders.holders("tcp", "127.0.0.1", client_port)
        assert [each.inode for each in found] == [processes.socket_inode(client.fileno())]


def test_nobody_holds_a_port_in_time_wait(netns: object) -> None:
    with ExitStack() as stack:
        made, port = bound(stack, "tcp", "127.0.0.1")
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        server, _ = made.accept()
        made.close()
        server.close()
        assert client.recv(1) == b""
        client.close()
        eventually(lambda: f":{port:04X} " in Path("/proc/net/tcp").read_text(), True)
        assert port_holders.holders("tcp", "127.0.0.1", port) == []


def test_holder_that_cannot_be_seen(tmp_path: Path) -> None:
    with ExitStack() as stack:
        made, port = bound(stack, "tcp", "127.0.0.1")
        inode = processes.socket_inode(made.fileno())
        (tmp_path / "net").mkdir()
        (tmp_path / "net" / "tcp").write_bytes(Path("/proc/net/tcp").read_bytes())
        (found,) = port_holders.holders("tcp", "127.0.0.1", port, str(tmp_path))
    assert found == port_holders.Holder(None, None, os.getuid(), inode, "127.0.0.1")
    assert str(found) == f"a process of uid {os.getuid()} that cannot be seen from here"


# ---- cost


def test_import_is_cheap() -> None:
    code = """
import sys
before = set(sys.modules)
import steer.linux.processes, steer.linux.topology
print(*set(sys.modules) - before)
"""
    out = subprocess.run(python(code), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not {"ctypes", "pathlib", "asyncio", "rich"} & set(out.split())


# ---- event loops

LOOPS = {
    "epoll": ("import select; e = select.epoll(); e.register(s, 1); e.poll()", Seen.YES),
    "poll": ("import select; p = select.poll(); p.register(s, 1); p.poll()", Seen.YES),
    "select": ("import select; select.select([s], [], [])", Seen.YES),
    "accept": ("s.accept()", Seen.NO),
    "sleep": ("import time; time.sleep(1000)", Seen.NO),
    "read": ("import os; os.read(os.pipe()[0], 1)", Seen.NO),
}


@pytest.mark.parametrize(("code", "seen"), LOOPS.values(), ids=LOOPS.keys())
def test_asleep_in_an_event_loop(listener: socket.socket, code: str, seen: Seen) -> None:
    """Whatever is in its set."""
    code = f"{SOCKET}print('here', flush=True)\n{code}"
    with running(*python(code, listener.fileno()), fds=(listener.fileno(),)) as process:
        assert line_of(process) == "here"
        eventually(lambda: state(process.pid), "S")
        eventually(lambda: in_event_loop([process.pid]), seen)
        waiting = waits_on(process.pid, inodes_of(listener)) is Seen.YES
        expected = {process.pid} if waiting else set()
        assert acceptors(process.pid, inodes_of(listener)) == expected


def test_a_thread_that_has_ended_is_in_no_event_loop(ended_pid: int) -> None:
    assert in_event_loop([ended_pid]) is Seen.NO
    assert in_event_loop([]) is Seen.NO


def test_a_process_that_calls_itself_something_odd() -> None:
    """15 is PR_SET_NAME; the name is in brackets in /proc/PID/stat."""
    name = b"a) Z 1\n(\x1b[31mB"
    rename = f"import ctypes; ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)"
    with running(*python(f"{rename}; print(flush=True); input()")) as it:
        line_of(it)
        assert processes.command(it.pid) == "a) Z 1([31mB"
        assert processes.is_alive(it.pid)
        assert processes.parent(it.pid) == os.getpid()


def test_a_very_long_command_line(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cmdline").write_bytes(b"python3\0-m\0gunicorn\0" + b"x" * (1 << 23))
    found = processes.arguments(7, str(tmp_path))
    assert found[:3] == ["python3", "-m", "gunicorn"]
    assert sum(map(len, found)) <= processes.MOST_ARGUMENT_BYTES
