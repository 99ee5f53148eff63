"""How processes wait for a socket, on real ones."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from steer.linux import processes, waiting
from steer.linux.waiting import Wait
from testkit.confine import NOBODY
from testkit.processes import eventually, line_of, python, running
from testkit.programs import source

HAS = """
import os, select, signal, socket, sys
s = socket.socket(fileno=int(sys.argv[1]))
print("here", flush=True)
"""
EXCLUSIVE = "e.register(s, select.EPOLLIN | select.EPOLLEXCLUSIVE)"
HOW = {
    "s.accept()": Wait.ACCEPT,
    "s.settimeout(1000); s.accept()": Wait.POLL,
    "select.select([s], [], [])": Wait.POLL,
    "e = select.epoll(); e.register(s, select.EPOLLIN); e.poll()": Wait.EPOLL,
    f"e = select.epoll(); {EXCLUSIVE}; e.poll()": Wait.EXCLUSIVE,
    # It is busy with a request, say.
    f"e = select.epoll(); {EXCLUSIVE}; os.read(os.pipe()[0], 1)": Wait.EXCLUSIVE,
    "import threading; threading.Thread(target=s.accept).start(); signal.pause()": Wait.ACCEPT,
}
HOW_NOT = (
    "signal.pause()",
    "e = select.epoll(); e.register(s, select.EPOLLOUT); e.poll()",
    "e = select.epoll(); e.register(os.pipe()[0], select.EPOLLIN); e.poll()",
    "select.select([], [s], [])",
)


@contextmanager
def has(listener: socket.socket, code: str) -> Iterator[int]:
    number = listener.fileno()
    with running(*python(HAS + code, number), fds=(number,)) as process:
        assert line_of(process) == "here"
        yield process.pid


def inode(listener: socket.socket) -> int:
    return processes.socket_inode(listener.fileno())


@pytest.mark.parametrize("code", HOW)
def test_how_it_waits(listener: socket.socket, code: str) -> None:
    wanted = frozenset({inode(listener)})
    with has(listener, code) as pid:
        eventually(lambda: waiting.waits(pid, wanted), {inode(listener): HOW[code]})


@pytest.mark.parametrize("code", HOW_NOT)
def test_that_it_does_not_wait(listener: socket.socket, code: str) -> None:
    with has(listener, code) as pid:
        stat = Path(f"/proc/{pid}/stat")
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0], "S")
        assert waiting.waits(pid, frozenset({inode(listener)})) == {}


@pytest.mark.needs("io_uring")
def test_an_accept_in_a_ring(listener: socket.socket) -> None:
    code = source("accepts_by_ring") + "ring = Ring(s)\nlibc.syscall(ENTER, ring.fd, 0, 1, 1, 0, 0)"
    with has(listener, code) as pid:
        wanted = frozenset({inode(listener)})
        eventually(lambda: waiting.waits(pid, wanted), {inode(listener): Wait.RING})


def test_another_process_that_waits_is_not_it(listener: socket.socket) -> None:
    with has(listener, "os.fork() or s.accept(); signal.pause()") as pid:
        wanted = frozenset({inode(listener)})
        child = eventually(lambda: processes.children(pid))[0]
        eventually(lambda: waiting.waits(child, wanted), {inode(listener): Wait.ACCEPT})
        assert waiting.waits(pid, wanted) == {}


def test_of_thousands_each_is_found(listener: socket.socket) -> None:
    """What is registered with one epoll is more than one look at a worker goes through."""
    code = """
e = select.epoll()
for _ in range(3000):
    e.register(os.dup(0), select.EPOLLIN)
e.register(s, select.EPOLLIN)
print("there", flush=True)
e.poll()
"""
    with running(*python(HAS + code, listener.fileno()), fds=(listener.fileno(),)) as process:
        assert [line_of(process), line_of(process)] == ["here", "there"]
        wanted = frozenset({inode(listener)})
        assert waiting.waits(process.pid, wanted) == {inode(listener): Wait.EPOLL}


@pytest.mark.needs("nobody")
def test_of_other_users_it_cannot_be_seen(listener: socket.socket) -> None:
    with has(listener, "s.accept()") as pid:
        code = f"from steer.linux import waiting; print(waiting.waits({pid}, frozenset({{1}})))"
        asking = ("setpriv", f"--reuid={NOBODY}", "--clear-groups", *python(code))
        with running(*asking) as other:
            assert line_of(other) == "None"


def test_nobody_is_there(ended: int, listener: socket.socket) -> None:
    assert waiting.waits(ended, frozenset({inode(listener)})) == {}


@pytest.fixture
def ended() -> int:
    """The number of a process that was."""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return pid
    os._exit(0)


def test_thread_that_waits_is_told_from_others() -> None:
    code = """
import os, select, signal, socket, threading
them = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
def poll(sock):
    epoll = select.epoll()
    epoll.register(sock, select.EPOLLIN)
    epoll.poll()
threads = [threading.Thread(target=poll, args=[each], daemon=True) for each in them[1:]]
for each in threads:
    each.start()
numbers = [os.fstat(each.fileno()).st_ino for each in them] + [each.native_id for each in threads]
print(*numbers, flush=True)
signal.pause()
"""
    with running(*python(code)) as process:
        idle, first, second, *tids = map(int, line_of(process).split())
        wanted = frozenset({idle, first, second})
        expected = dict(zip((first, second), tids, strict=True))
        eventually(lambda: waiting.thread_of_each(process.pid, wanted), expected)
