"""How many connections are handled on the CPU that took their packets in.

Over loopback that is the client's own CPU, so a client goes from one to the next.
Compared are `cpu`, the kernel's hash with SO_INCOMING_CPU on the socket of each
pinned worker, and the hash alone. The CPU is what the worker itself says it ran on.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from bench import machine, servers
from bench.figures import Figure, Section, above, interleaved
from bench.servers import HOST
from steer.control import client, find
from steer.errors import SteerError

PER_CPU = 2
"""Workers."""
_PORT = 9400
_OURS, _THEIRS, _NEITHER = "cpu", "hash with SO_INCOMING_CPU", "hash"
_SERVICES = {
    _OURS: ["--policy", "cpu"],
    _THEIRS: ["bench.pinned:by_incoming_cpu", "--policy", "kernel"],
    _NEITHER: ["bench.pinned:by_hash", "--policy", "kernel"],
}
_TIMEOUT_S = 10.0


def run(quick: bool) -> list[Section]:
    rounds, requests = (1, 10) if quick else (7, 100)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="steer-bench-"))
        environment = servers.environment(directory)
        subjects: dict[str, Callable[[], float]] = {}
        for port, (name, options) in enumerate(_SERVICES.items(), _PORT):
            command = _command(port, options)
            stack.enter_context(servers.server(command, port, environment)).first_answer_s()
            _wait_for_all(servers.name(port), environment)
            for protocol, ask in (("TCP", _ask_tcp), ("UDP", _ask_udp)):
                subjects[f"{name}, {protocol}"] = partial(_local_percent, ask, port, requests)
        found = interleaved(subjects, rounds)
    title = f"locality, {PER_CPU} workers per CPU, handled on the CPU of the packet"
    return [Section(title, _figures(found))]


def _command(port: int, options: Iterable[str]) -> list[str]:
    workers = PER_CPU * len(os.sched_getaffinity(0))
    return servers.steer_run(port, workers, "-b", f"udp://{HOST}:{port}", *options)


def _wait_for_all(name: str, environment: Mapping[str, str]) -> None:
    until_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < until_s:
        answer = client.ask(find.locate(name, None, environment), "status")
        if all(worker["state"] == "ready" for worker in answer["service"]["workers"]):
            return
        time.sleep(0.01)
    raise SteerError(f"start {name}", f"not all workers ready in {_TIMEOUT_S:g} s")


def _local_percent(ask: Callable[[int], bytes], port: int, requests: int) -> float:
    cpus = os.sched_getaffinity(0)
    local = 0
    for cpu in sorted(cpus):
        with machine.pinned(cpu):
            local += sum(json.loads(ask(port))["cpu"] == cpu for _ in range(requests))
    return 100 * local / (requests * len(cpus))


def _ask_tcp(port: int) -> bytes:
    return servers.get(port)


def _ask_udp(port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.connect((HOST, port))
        sock.send(b"\n")
        return sock.recv(4096)


def _figures(found: Mapping[str, tuple[float, ...]]) -> list[Figure]:
    shares = [Figure(name, "%", values) for name, values in found.items()]
    gains = [
        replace(
            above(
                f"{_OURS} above {_THEIRS}, {protocol}",
                "points",
                found[f"{_OURS}, {protocol}"],
                found[f"{_THEIRS}, {protocol}"],
            ),
            at_least=0,
        )
        for protocol in ("TCP", "UDP")
    ]
    return shares + gains
