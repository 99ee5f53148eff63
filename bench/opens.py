"""What counting the open connections of each worker costs, a connection.

The sock_ops program of bpf/open.c runs for every TCP socket of its cgroup: here at both ends of a
connection, as the client is in there too, which of a client elsewhere is saved. An empty program
beside it, which runs as often, tells how much of the time is the clock's.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

from bench.figures import Figure, Section
from bench.servers import HOST
from steer import abi
from steer.bytecode import Code
from steer.kernel import bpf, cgroup, compile, measure, sockets

_SLOT, _STAMP = 1, 0


class Spent(NamedTuple):
    """By a connection and its end.

    Args:
        runs: of each program.
        count_ns, empty_ns: in all of them.
    """

    runs: float
    count_ns: float
    empty_ns: float


def section(quick: bool) -> Section:
    """Raises KernelError: sock_ops programs cannot be attached here."""
    rounds, connections = (1, 100) if quick else (31, 1000)
    with ExitStack() as stack:
        stack.enter_context(measure.statistics())
        listener = stack.enter_context(socket.create_server((HOST, 0)))
        count = _counting(stack, listener)
        empty = _attached(stack, measure.EMPTY, {})
        found = [_spent(count, empty, listener, connections) for _ in range(rounds + 1)][1:]
    own_ns = [each.count_ns - each.empty_ns for each in found]
    runs = [each.runs for each in found]
    per_run_ns = [ns / number for ns, number in zip(own_ns, runs, strict=True)]
    return Section(
        "counting open connections, with client and worker in the same cgroup",
        [
            Figure("a connection, above an empty program", "ns", tuple(own_ns)),
            Figure("a run, above an empty program", "ns", tuple(per_run_ns)),
            Figure("runs in a connection", "", tuple(runs)),
        ],
    )


def _counting(stack: ExitStack, listener: socket.socket) -> bpf.Program:
    """The program, as steer attaches it, and the listener as that of a worker."""
    names = ("slots", "listeners", "moved", "owners")
    maps = {name: stack.enter_context(bpf.Map(name)) for name in names}
    owner = abi.OWNER.pack(_SLOT, 0, _STAMP)
    maps["owners"].put(listener.fileno(), owner)
    maps["listeners"].put(sockets.cookie(listener.fileno()), owner)
    return _attached(stack, compile.load(compile.sources() / "open.c").programs["count"], maps)


def _attached(stack: ExitStack, code: Code, maps: Mapping[str, bpf.Map]) -> bpf.Program:
    program = stack.enter_context(bpf.Program("bench", code, maps, abi.BPF_CGROUP_SOCK_OPS))
    with cgroup.own() as directory:
        stack.enter_context(bpf.Link(program, directory))
    return program


def _spent(
    count: bpf.Program, empty: bpf.Program, listener: socket.socket, connections: int
) -> Spent:
    before = [*measure.spent(count), *measure.spent(empty)]
    for _ in range(connections):
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()
    after = [*measure.spent(count), *measure.spent(empty)]
    count_ns, runs, empty_ns, _ = (b - a for a, b in zip(before, after, strict=True))
    return Spent(runs / connections, count_ns / connections, empty_ns / connections)
