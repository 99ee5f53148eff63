"""Which process waits on a listener that several hold."""

from __future__ import annotations

import os
import socket

import pytest

from steer.attach import holders
from steer.linux import processes
from testkit.processes import line_of, python, running

pytestmark = [pytest.mark.needs("netns", "root"), pytest.mark.usefixtures("netns")]

BUSY = """
import select, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
epoll = select.epoll()
epoll.register(sock, select.EPOLLIN)
print("here", flush=True)
sys.stdin.read()
"""


def test_worker_that_is_busy_waits_and_its_parent_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        inode = processes.socket_inode(sock.fileno())
        with running(*python(BUSY, sock.fileno()), fds=[sock.fileno()]) as worker:
            assert line_of(worker) == "here"
            held = holders.find({inode}, {os.getpid(), worker.pid})
            assert {each.pid for each in held[inode]} == {os.getpid(), worker.pid}
            assert holders.waiters(held) == {inode: worker.pid}
