"""Sockets of another process: borrowed, looked at, and relieved of their queues."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import pytest

from steer.backends.base import Counts
from steer.errors import KernelError
from steer.linux import activity, processes
from steer.linux.waiting import Seen, waits_on
from steer.policy.builtin import EBPF
from steer.sockets import listeners
from steer.sockets.listeners import Borrower, Waiting, move_queue, waiting
from testkit.confine import NOBODY
from testkit.harness import PORT, Harness
from testkit.processes import eventually, line_of, python, running
from testkit.programs import source

pytestmark = pytest.mark.needs("pidfd_getfd")

SOCKET = "import os, socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\n"
HERE = "print('here', flush=True)\n"
UNTIL_TOLD = "sys.stdin.readline()\n"


@contextmanager
def process(code: str, *sockets: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """Python that has the sockets, as sys.argv says, and has said "here"."""
    fds = [each.fileno() for each in sockets]
    with running(*python(code, *fds), fds=fds, stderr=subprocess.STDOUT) as child:
        assert line_of(child) == "here"
        yield child


def tell(child: subprocess.Popen[str]) -> None:
    """End its UNTIL_TOLD."""
    assert child.stdin
    child.stdin.write("\n")
    child.stdin.flush()


def inode(sock: socket.socket) -> int:
    return processes.socket_inode(sock.fileno())


def borrower(pid: int, *sockets: socket.socket) -> Borrower:
    return Borrower(pid, frozenset(map(inode, sockets)))


def is_refused(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)):
            return False
    except ConnectionRefusedError:
        return True


# ---- borrowing

FAMILIES = {
    "the process": HERE + UNTIL_TOLD,
    "its child": f"""
if os.fork():
    s.close()
    os.wait()
{HERE}{UNTIL_TOLD}""",
    "its grandchild": f"""
if os.fork() or os.fork():
    os.close(s.detach())
    os.wait()
{HERE}{UNTIL_TOLD}""",
    "under another number": f"""
n = os.dup(s.fileno())
s.close()
{HERE}{UNTIL_TOLD}""",
}


@pytest.mark.parametrize("code", FAMILIES.values(), ids=FAMILIES.keys())
def test_lends_what_is_open_in(listener: socket.socket, code: str) -> None:
    with process(SOCKET + code, listener) as child:
        lender = borrower(child.pid, listener)
        for _ in range(3):
            with lender.borrow() as lent:
                assert list(lent) == [inode(listener)]
                assert inode(lent[inode(listener)]) == inode(listener)


def test_lends_several_of_any_kind(listener: socket.socket, datagrams: socket.socket) -> None:
    with process(SOCKET + HERE + UNTIL_TOLD, listener, datagrams) as child:
        with borrower(child.pid, listener, datagrams).borrow() as lent:
            kinds = [(lent[inode(s)].family, lent[inode(s)].type) for s in (listener, datagrams)]
        assert kinds == [
            (socket.AF_INET, socket.SOCK_STREAM),
            (socket.AF_INET6, socket.SOCK_DGRAM),
        ]


def test_keeps_nothing(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with process(SOCKET + HERE + UNTIL_TOLD, listener) as child:
        before = os.listdir("/proc/self/fd")
        lender = borrower(child.pid, listener)
        with lender.borrow() as lent:
            assert not any(os.get_inheritable(each.fileno()) for each in lent.values())
        assert os.listdir("/proc/self/fd") == before
        listener.close()
        assert not is_refused(port)
        with lender.borrow() as lent:
            assert lent
            child.kill()
            child.wait()
            assert not is_refused(port)
        assert is_refused(port)


def test_does_not_touch_the_file_status_flags(listener: socket.socket) -> None:
    with process(SOCKET + HERE + UNTIL_TOLD, listener) as child:
        for blocking in (True, False):
            listener.setblocking(blocking)
            with borrower(child.pid, listener).borrow() as lent:
                assert os.get_blocking(lent[inode(listener)].fileno()) == blocking
            assert os.get_blocking(listener.fileno()) == blocking


def test_finds_again_what_moved(listener: socket.socket) -> None:
    """Another socket takes its number, then the number is closed, then the process ends."""
    code = f"""
if os.fork() == 0:
    sys.stdin = open(os.devnull)
    while True: time.sleep(1000)
n = os.dup(s.fileno())
os.dup2(socket.socket().detach(), s.fileno())
{HERE}{UNTIL_TOLD}os.close(n)
{HERE}{UNTIL_TOLD}"""
    with process(f"import time\n{SOCKET}{HERE}{UNTIL_TOLD}{code}", listener) as child:
        lender = borrower(child.pid, listener)
        for _ in range(2):
            with lender.borrow() as lent:
                assert list(lent) == [inode(listener)]
            tell(child)
            assert line_of(child) == "here"
        with lender.borrow() as lent:
            assert list(lent) == [inode(listener)]


def test_leaves_out_what_is_closed(listener: socket.socket, datagrams: socket.socket) -> None:
    code = f"{SOCKET}{HERE}{UNTIL_TOLD}s.close()\n{HERE}{UNTIL_TOLD}"
    with process(code, listener, datagrams) as child:
        lender = borrower(child.pid, listener, datagrams)
        with lender.borrow() as lent:
            assert lent.keys() == {inode(listener), inode(datagrams)}
        tell(child)
        assert line_of(child) == "here"
        with lender.borrow() as lent:
            assert lent.keys() == {inode(datagrams)}
        child.kill()
        eventually(lambda: processes.open_sockets(child.pid), set())
        with lender.borrow() as lent:
            assert lent == {}


@pytest.mark.needs("nobody")
def test_refused(listener: socket.socket) -> None:
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from steer.errors import KernelError
from steer.sockets.listeners import Borrower
import os
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
{HERE}
try:
    with Borrower({os.getpid()}, frozenset({{ {inode(listener)} }})).borrow():
        pass
except KernelError as error:
    print(error, flush=True)
"""
    with process(code) as child:
        said = line_of(child)
    assert said.startswith(f"look at the open files of pid {os.getpid()}: EACCES; ")


REFUSALS = {
    1: "EPERM; needs ptrace(2) access: run as root with CAP_SYS_PTRACE, or as the worker's "
    "user with kernel.yama.ptrace_scope 0 (1 does for an ancestor)",
    38: "ENOSYS; Linux 5.6 has it",
    24: "EMFILE; raise the limit on open files (ulimit -n, LimitNOFILE=)",
}


@pytest.mark.parametrize("number", REFUSALS)
def test_refused_by_the_system_call(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(pid: int, fd: int) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr(listeners, "pidfd_getfd", refuse)
    with pytest.raises(KernelError) as caught, borrower(os.getpid(), listener).borrow():
        pass
    assert str(caught.value) == f"borrow a socket of pid {os.getpid()}: {REFUSALS[number]}"


# ---- what waits


def test_connections_that_wait(listener: socket.socket) -> None:
    listener.listen(3)
    assert waiting(listener) == Waiting(0, 3)
    with ExitStack() as stack:
        for number in range(1, 5):
            stack.enter_context(socket.create_connection(listener.getsockname()))
            eventually(lambda: waiting(listener), Waiting(number, 3))
        listener.accept()[0].close()
        assert waiting(listener) == Waiting(3, 3)


def test_nothing_waits_where_nobody_listens(listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as client:
        client.send(b"unanswered")
        assert waiting(client) == Waiting(0, 0)
    listener.shutdown(socket.SHUT_RDWR)
    assert waiting(listener) == Waiting(0, 0)


def test_datagrams_that_wait(datagrams: socket.socket) -> None:
    room = datagrams.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert waiting(datagrams) == Waiting(0, room)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
        for _ in range(10):
            client.sendto(b"x" * 100, datagrams.getsockname())
    eventually(lambda: waiting(datagrams).queued >= 10 * 100)
    for _ in range(10):
        assert waiting(datagrams).queued > 0
        datagrams.recv(100)
    assert waiting(datagrams) == Waiting(0, room)


# ---- moving a queue

moves = pytest.mark.needs("bpf", "migrate", "netns")


def queue(harness: Harness, clients: ExitStack, slot: int, number: int) -> list[bytes]:
    """Connections that wait at `slot`, the only one chosen, and what each has sent."""
    harness.steer(slot)
    sent = [os.urandom(8) for _ in range(number)]
    for data in sent:
        clients.enter_context(harness.send(harness.binds[0])).send(data)
    eventually(lambda: queued(harness)[slot], number)
    return sent


def queued(harness: Harness) -> dict[int, int]:
    return {slot: waiting(sock).queued for slot, [sock] in harness.sockets.items()}


def received(sock: socket.socket, number: int) -> list[bytes]:
    found = []
    for _ in range(number):
        accepted, _ = sock.accept()
        with accepted:
            accepted.setblocking(True)
            found.append(accepted.recv(100))
    return found


def put_again(harness: Harness, slot: int) -> None:
    harness.backend.add_member(slot, [os.dup(sock.fileno()) for sock in harness.sockets[slot]])


@moves
@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize("kind", ["tcp4", "tcp6"])
def test_queue_of_a_backup_listener_goes_to_a_worker_that_joins(
    kind: str, clients: ExitStack
) -> None:
    """Connections wait where nobody accepts, until there is somebody; twice over."""
    worker, backup = 0, 1
    with Harness(EBPF, "hash", kind, workers=2) as harness:
        harness.join(backup)
        for _ in range(2):
            sent = queue(harness, clients, backup, 300)
            harness.join(worker)
            harness.steer(worker)
            move_queue(harness.sockets[backup][0])
            assert queued(harness) == {worker: 300, backup: 0}
            assert received(harness.sockets[worker][0], 300) == sent
            assert harness.count(10) == {worker: 10}
            put_again(harness, backup)
            harness.steer(backup)
            harness.leave(worker)
        assert harness.count(10) == {backup: 10}
        assert harness.backend.unsteered() == 0


@moves
@pytest.mark.usefixtures("netns")
def test_queue_is_spread_over_the_workers(clients: ExitStack) -> None:
    """By a hash of each connection's addresses: 6 standard deviations are allowed."""
    with Harness(EBPF, "hash", "tcp4", workers=5) as harness:
        harness.join(*range(5))
        sent = queue(harness, clients, 4, 400)
        harness.steer(0, 1, 2, 3)
        move_queue(harness.sockets[4][0])
        share = queued(harness)
        assert share.pop(4) == 0
        assert all(48 <= number <= 152 for number in share.values())
        got = [received(harness.sockets[slot][0], number) for slot, number in share.items()]
        assert sorted(chain.from_iterable(got)) == sorted(sent)


@pytest.mark.usefixtures("netns")
@pytest.mark.needs("netns")
def test_goes_on_listening_with_its_backlog_and_options() -> None:
    with socket.create_server(("127.0.0.1", PORT), backlog=7) as listener:
        keeps(listener)


def keeps(listener: socket.socket) -> None:
    """Its address, backlog and options, and no error."""
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3),
        (socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5),
        (socket.IPPROTO_IP, socket.IP_TOS, 16),
    ]
    for level, option, value in options:
        listener.setsockopt(level, option, value)
    address = listener.getsockname()
    move_queue(listener)
    assert waiting(listener) == Waiting(0, 7)
    assert listener.getsockname() == address
    assert [listener.getsockopt(level, option) for level, option, _ in options] == [
        value for *_, value in options
    ]
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_needs_a_listener(listener: socket.socket) -> None:
    listener.shutdown(socket.SHUT_RDWR)
    with pytest.raises(OSError, match="not connected"):
        move_queue(listener)
    assert waiting(listener) == Waiting(0, 0)


# each prints an error or an event without a connection, and the number of those accepted
OWNERS = {
    "accept": """
while True:
    accept()""",
    "epoll": """
import select
s.setblocking(False)
e = select.epoll(); e.register(s, select.EPOLLIN)
while True:
    for _ in e.poll(): accept()""",
    "poll": """
import select
s.setblocking(False)
p = select.poll(); p.register(s, select.POLLIN)
while True:
    for _ in p.poll(): accept()""",
}
ACCEPT = """
def accept():
    try:
        s.accept()[0].close()
    except OSError as error:
        print(error, flush=True)
    else:
        print("accepted", flush=True)
"""


@moves
@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize("code", OWNERS.values(), ids=OWNERS.keys())
def test_stopped_owner_does_not_notice(clients: ExitStack, code: str) -> None:
    with Harness(EBPF, "hash", "tcp4", workers=2) as harness:
        harness.join(0, 1)
        [sock] = harness.sockets[0]
        sock.setblocking(code == OWNERS["accept"])
        with process(SOCKET + ACCEPT + HERE + code, sock) as owner:
            eventually(lambda: waits_on(owner.pid, frozenset({inode(sock)})), Seen.YES)
            os.kill(owner.pid, signal.SIGSTOP)
            eventually(lambda: activity.is_stopped(owner.pid))
            lender = borrower(owner.pid, sock)
            for _ in range(5):
                sent = queue(harness, clients, 0, 10)
                harness.steer(1)
                with lender.borrow() as lent:
                    move_queue(lent[inode(sock)])
                put_again(harness, 0)
                assert queued(harness) == {0: 0, 1: 10}
                assert received(harness.sockets[1][0], 10) == sent
            os.kill(owner.pid, signal.SIGCONT)
            harness.steer(0)
            for _ in range(3):
                clients.enter_context(harness.send(harness.binds[0]))
            assert [line_of(owner) for _ in range(3)] == ["accepted"] * 3


ASYNCIO = """
import asyncio
async def handle(reader, writer):
    if await reader.read(100) == b"busy":
        print("busy", flush=True)
        sys.stdin.readline()
    writer.write(b"answer")
    writer.close()
    await writer.wait_closed()
async def serve():
    server = await asyncio.start_server(handle, sock=s)
    print("here", flush=True)
    await server.serve_forever()
asyncio.run(serve())
"""


@moves
@pytest.mark.usefixtures("netns")
def test_busy_asyncio_server_does_not_notice(clients: ExitStack) -> None:
    with Harness(EBPF, "hash", "tcp4", workers=2) as harness:
        harness.join(0, 1)
        harness.steer(0)
        [sock] = harness.sockets[0]
        with process(SOCKET + ASYNCIO, sock) as owner:
            first = clients.enter_context(harness.send(harness.binds[0]))
            first.send(b"busy")
            assert line_of(owner) == "busy"
            sent = queue(harness, clients, 0, 10)
            harness.steer(1)
            with borrower(owner.pid, sock).borrow() as lent:
                move_queue(lent[inode(sock)])
            assert received(harness.sockets[1][0], 10) == sent
            put_again(harness, 0)
            harness.steer(0)
            tell(owner)
            assert first.recv(100) == b"answer"
            quick = clients.enter_context(harness.send(harness.binds[0]))
            quick.send(b"quick")
            assert quick.recv(100) == b"answer"
            owner.kill()
            assert line_of(owner) == ""  # nothing on stderr


# ---- under load

SERVER = source("answers_on_many")

CLIENTS = source("sixteen_clients")


@moves
@pytest.mark.usefixtures("netns")
def test_nothing_is_lost_under_load() -> None:
    """Again and again the server stops, a listener is left out, what waits there is moved, it is
    chosen again and the server goes on."""
    with Harness(EBPF, "round-robin", "tcp4", workers=4).serving() as harness, ExitStack() as stack:
        server = stack.enter_context(
            process(SERVER, *(sock for [sock] in harness.sockets.values()))
        )
        load = stack.enter_context(process(CLIENTS))
        moved = [move_away(harness, server.pid, at % 4) for at in range(80)]
        eventually(lambda: sum(harness.selected().values()) - sum(moved) >= 1000)
        tell(load)
        number, outcome = line_of(load).split(" ", 1)
        assert (outcome, line_of(load)) == ("answered", "")
        counts = [harness.backend.counts(slot) or Counts() for slot in range(4)]
        assert sum(count.migrated for count in counts) == sum(moved) >= len(moved)
        assert sum(count.selected - count.migrated for count in counts) == int(number) >= 1000


def move_away(harness: Harness, server: int, slot: int) -> int:
    """How many connections were moved."""
    [sock] = harness.sockets[slot]
    os.kill(server, signal.SIGSTOP)
    eventually(lambda: activity.is_stopped(server) and waiting(sock).queued)
    harness.steer(*(other for other in range(4) if other != slot))
    time.sleep(0.005)  # for the program that yet runs, and handshakes that had begun
    with borrower(server, sock).borrow() as lent:
        queued = waiting(sock).queued
        move_queue(lent[inode(sock)])
    put_again(harness, slot)
    harness.steer()
    os.kill(server, signal.SIGCONT)
    time.sleep(0.005)
    return queued
