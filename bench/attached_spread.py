"""How evenly connections are spread over the listeners of servers that are attached."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from bench import attached, servers
from bench.attached import ALL, Running
from bench.figures import Figure, Section
from bench.servers import HOST
from steer.control import client
from steer.control.schema import Worker
from steer.errors import SteerError

_CPUS = os.cpu_count() or 1
_HALF_A_REQUEST = b"GET / HTTP/1.1\r\n"
_SETTLED_S, _LOOK_AGAIN_S = 10.0, 0.02


def sections(port: int, environment: Mapping[str, str], connections: int) -> Iterator[Section]:
    held = connections // 10
    even: dict[str, list[Figure]] = {"round-robin": [], "least-conn": []}
    for kind in ALL:
        with attached.running(kind, port, environment) as at:
            turns = _turns(at, environment, connections)
            opened = _opened(at, environment, held)
        even["round-robin"].append(_figure(kind.name, turns, _CPUS))
        even["least-conn"].append(_figure(kind.name, opened, 1))
    yield Section(f"round-robin, {connections} connections", even["round-robin"])
    yield Section(f"least-conn, {held} connections that stay open", even["least-conn"])


def _figure(name: str, counts: list[int], at_most: int) -> Figure:
    return Figure(f"{name}: most less fewest", "", (max(counts) - min(counts),), at_most)


def _turns(at: Running, environment: Mapping[str, str], connections: int) -> list[int]:
    """How many connections each listener got."""
    with attached.attached(at, environment, "--policy", "round-robin"):
        before = {each.slot: each.connections.selected or 0 for each in _workers(at, environment)}
        for _ in range(connections):
            servers.get(at.port)
        after = {each.slot: each.connections.selected or 0 for each in _workers(at, environment)}
    return [count - before.get(slot, 0) for slot, count in after.items()]


def _opened(at: Running, environment: Mapping[str, str], connections: int) -> list[int]:
    """How many connections each listener has open, if clients are slow to send a request."""
    with attached.attached(at, environment, "--policy", "least-conn"), ExitStack() as clients:
        _settled(at, environment, lambda counts: not sum(counts))
        for _ in range(connections):
            sock = clients.enter_context(socket.create_connection((HOST, at.port)))
            sock.sendall(_HALF_A_REQUEST)
        return _settled(at, environment, lambda counts: sum(counts) == connections)


def _settled(
    at: Running, environment: Mapping[str, str], is_settled: Callable[[list[int]], bool]
) -> list[int]:
    """Open connections by listener, once they are as they should be. Raises SteerError."""
    end_s = time.monotonic() + _SETTLED_S
    while True:
        counts = [each.connections.open or 0 for each in _workers(at, environment)]
        if is_settled(counts):
            return counts
        if time.monotonic() > end_s:
            raise SteerError(f"count open connections of {at.kind.name}", f"still {counts}")
        time.sleep(_LOOK_AGAIN_S)


def _workers(at: Running, environment: Mapping[str, str]) -> list[Worker]:
    path = Path(environment["STEER_RUNTIME_DIR"], f"{servers.name(at.port)}.sock")
    return client.status(path).services[0].workers
