"""What counting the open connections of each worker costs, a connection.

The sock_ops program of bpf/open.c runs for every TCP socket of its cgroup: here at both ends of a
connection, as the client is in there too, which of a client elsewhere is saved. An empty program
beside it, which runs as often, tells how much of the time is the clock's. With another checkout
(`loaded.BASE`) its program takes turns with ours.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from bench import loaded
from bench.figures import Figure, Section, interleaved, ratio
from bench.servers import HOST
from steer import abi
from steer.linux import cgroup
from steer.loader import cost, libbpf, programs

AT_MOST = 0.6
"""To the other checkout."""


class Spent(NamedTuple):
    """By a connection and its end.

    Args:
        runs: of the program.
        own_ns: in all of them, above those of the empty one.
    """

    runs: float
    own_ns: float


def section(quick: bool) -> Section:
    """Raises KernelError: sock_ops programs cannot be attached here."""
    rounds, connections = (1, 100) if quick else (31, 1000)
    with ExitStack() as stack:
        stack.enter_context(cost.statistics())
        listener = stack.enter_context(socket.create_server((HOST, 0)))
        empty = stack.enter_context(
            programs.Program("bench", cost.EMPTY, {}, abi.BPF_CGROUP_SOCK_OPS)
        )
        fd = listener.fileno()
        ours = loaded.counting_program(stack, fd)
        counts = [ours, *loaded.of_base(stack, "counting", fd)]
        subjects = {
            number: partial(_spent, count, empty, listener, connections)
            for number, count in enumerate(counts)
        }
        found, *others = interleaved(subjects, rounds).values()
    own_ns = [each.own_ns for each in found]
    per_run_ns = [each.own_ns / each.runs for each in found]
    return Section(
        "counting open connections, with client and worker in the same cgroup",
        [
            Figure("a connection, above an empty program", "ns", tuple(own_ns)),
            Figure("a run, above an empty program", "ns", tuple(per_run_ns)),
            Figure("runs in a connection", "", tuple(each.runs for each in found)),
            *(
                ratio("to the other checkout", own_ns, [each.own_ns for each in other], AT_MOST)
                for other in others
            ),
        ],
    )


def _spent(
    count: libbpf.Descriptor, empty: programs.Program, listener: socket.socket, connections: int
) -> Spent:
    with (
        cgroup.own() as directory,
        programs.Link(count, directory),
        programs.Link(empty, directory),
    ):
        before = [*cost.run_stats(count), *cost.run_stats(empty)]
        for _ in range(connections):
            with socket.create_connection(listener.getsockname()):
                listener.accept()[0].close()
        after = [*cost.run_stats(count), *cost.run_stats(empty)]
    count_ns, runs, empty_ns, _ = (b - a for a, b in zip(before, after, strict=True))
    return Spent(runs / connections, (count_ns - empty_ns) / connections)
