"""How long `steer inspect` takes where nothing serves, and where 5,000 sockets do.

They are in 50 groups, which 8 processes have open and wait for; `ss -ltnp`, which tells less of
each, is beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from bench import servers
from bench.figures import Figure, Section, above, interleaved, ratio
from bench.servers import tool

SOCKETS, GROUPS, PROCESSES = 5000, 50, 8
_PORT = 9950
WHOLE_AT_MOST_MS = 350.0
MORE_AT_MOST_MS = 60.0
_OURS, _SS = "steer inspect --json", "ss -ltnp"
_HOLDS = f"""
import resource, select, socket, sys
of_each, groups = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (of_each + 100, of_each + 100))
epoll, kept = select.epoll(), []
for number in range(of_each):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", {_PORT} + number % groups))
    sock.listen()
    epoll.register(sock, select.EPOLLIN)
    kept.append(sock)
print("there", flush=True)
epoll.poll()
"""


class _Took(NamedTuple):
    """Times of a command. That on the CPU tells more where the machine is busy."""

    wall_ms: float
    cpu_ms: float


def run(quick: bool) -> list[Section]:
    sockets, groups, rounds = (160, 4, 1) if quick else (SOCKETS, GROUPS, 15)
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        environment = servers.environment(directory)
        commands = {_OURS: [tool("steer"), "inspect", "--json"], _SS: ["ss", "-ltnp"]}
        subjects = {
            (name, count): partial(_took, command, environment, count, groups)
            for name, command in commands.items()
            for count in (0, sockets)
        }
        found = interleaved(subjects, rounds)
    ours, none, ss = found[_OURS, sockets], found[_OURS, 0], found[_SS, sockets]
    about = f"inspect, {sockets} sockets in {groups} groups of {PROCESSES} processes"
    return [
        Section(
            about,
            [
                Figure(_OURS, "ms", _wall(ours), WHOLE_AT_MOST_MS),
                Figure(f"{_OURS}, no sockets", "ms", _wall(none)),
                above("the sockets' part of it", "ms", _wall(ours), _wall(none), MORE_AT_MOST_MS),
                Figure(_SS, "ms", _wall(ss)),
                ratio(f"{_OURS} to {_SS}", _wall(ours), _wall(ss)),
            ],
        ),
        Section(
            f"{about}, CPU time",
            [
                Figure(_OURS, "ms", _cpu(ours)),
                above("the sockets' part of it", "ms", _cpu(ours), _cpu(none)),
                ratio(f"{_OURS} to {_SS}", _cpu(ours), _cpu(ss)),
            ],
        ),
    ]


def _wall(found: Iterable[_Took]) -> tuple[float, ...]:
    return tuple(each.wall_ms for each in found)


def _cpu(found: Iterable[_Took]) -> tuple[float, ...]:
    return tuple(each.cpu_ms for each in found)


def _took(
    command: Sequence[str], environment: Mapping[str, str], sockets: int, groups: int
) -> _Took:
    with held(sockets, groups):
        started_s = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        took_s = time.perf_counter() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return _Took(1000 * took_s, 1000 * (usage.ru_utime + usage.ru_stime))


@contextmanager
def held(sockets: int, groups: int) -> Iterator[None]:
    """Processes that have so many between them."""
    with ExitStack() as stack:
        for _ in range(PROCESSES if sockets else 0):
            command = [sys.executable, "-c", _HOLDS, str(sockets // PROCESSES), str(groups)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout
            process.stdout.readline()
        yield
