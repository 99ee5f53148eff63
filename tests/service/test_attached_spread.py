"""Servers that others wrote, attached: which of their listeners get how many connections."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from steer.sockets import sock_diag
from testkit import foreign
from testkit.attached import HOST, Attach, attaching
from testkit.harness import CPUS, PORT
from testkit.processes import DEADLINE_S, eventually
from testkit.service import Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

Starts = Callable[[Path], AbstractContextManager[object]]
AT = f"{HOST}:{PORT}"
ASKED, HELD = 100, 17
REQUEST = b"GET / HTTP/1.0\r\n\r\n"
HALF_OF_IT = b"GET / HTTP/1.0\r\n"


def server(name: str, start: Starts, listeners: int, *needs: str) -> object:
    marks = pytest.mark.needs(*(needs or (name,)))
    return pytest.param(start, listeners, id=name, marks=marks)


SERVERS = [
    server("apache", foreign.apache, os.sysconf("SC_NPROCESSORS_ONLN")),
    server("granian", foreign.granian, 2),
    server("gunicorn", lambda home: foreign.gunicorn(home, "--reuse-port"), 2),
    server("haproxy", lambda home: foreign.haproxy(home, 3, bind=AT), 3),
    server(
        "haproxy-shards",
        lambda home: foreign.haproxy(home, threads=4, bind=f"{AT} shards by-thread"),
        4,
        "haproxy",
    ),
    server("nginx", lambda home: foreign.nginx(home, f"{AT} reuseport"), 3),
    server("node-cluster", lambda _: foreign.node("node_cluster.js"), 3, "node"),
    server("node-threads", lambda _: foreign.node("node_threads.js"), 3, "node"),
    server("threads-in-c", foreign.threads_in_c, 8, "tcc"),
]
every_server = pytest.mark.parametrize("start, listeners", SERVERS)


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


def attached_to(attach: Attach, listeners: int, policy: str) -> Service:
    """Once the server has them all, and each is waited on."""
    eventually(lambda: len(sock_diag.listeners(socket.AF_INET, PORT)) == listeners)
    attached = attach("--policy", policy)
    eventually(lambda: [each["state"] for each in attached.workers()] == ["ready"] * listeners)
    return attached


def connection(text: bytes) -> socket.socket:
    sock = socket.create_connection((HOST, PORT), DEADLINE_S)
    sock.sendall(text)
    return sock


@every_server
def test_listeners_get_their_turns(
    attach: Attach, home: Path, start: Starts, listeners: int
) -> None:
    with start(home):
        attached = attached_to(attach, listeners, "round-robin")
        for _ in range(ASKED):
            with connection(REQUEST) as sock:
                assert sock.recv(1000).startswith(b"HTTP/1.")
        counts = attached.selected()
    assert (len(counts), sum(counts.values())) == (listeners, ASKED)
    assert max(counts.values()) - min(counts.values()) <= len(CPUS)


@every_server
def test_open_connections_are_even(
    attach: Attach, home: Path, start: Starts, listeners: int
) -> None:
    with start(home), ExitStack() as clients:
        attached = attached_to(attach, listeners, "least-conn")
        for _ in range(HELD):
            clients.enter_context(connection(HALF_OF_IT))
        eventually(lambda: sum(opened(attached)), HELD)
        counts = opened(attached)
    assert max(counts) - min(counts) <= 1


def opened(attached: Service) -> list[int]:
    return [each["connections"]["open"] for each in attached.workers()]
