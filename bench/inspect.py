"""How long `steer inspect` takes where nothing serves, and where 5,000 sockets do.

They are in 50 groups, which 8 processes have open and wait for; `ss -ltnp`, which tells less of
each, is beside it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

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


def run(quick: bool) -> list[Section]:
    sockets, groups, rounds = (160, 4, 1) if quick else (SOCKETS, GROUPS, 15)
    with tempfile.TemporaryDirectory(prefix="steer-bench-") as directory:
        environment = servers.environment(directory)
        commands = {_OURS: [tool("steer"), "inspect", "--json"], _SS: ["ss", "-ltnp"]}
        subjects = {
            (name, count): partial(_took_ms, command, environment, count, groups)
            for name, command in commands.items()
            for count in (0, sockets)
        }
        found = interleaved(subjects, rounds)
    with_all, with_none = found[_OURS, sockets], found[_OURS, 0]
    return [
        Section(
            f"inspect, {sockets} sockets in {groups} groups of {PROCESSES} processes",
            [
                Figure(_OURS, "ms", with_all, WHOLE_AT_MOST_MS),
                Figure(f"{_OURS}, no sockets", "ms", with_none),
                above("the sockets' part of it", "ms", with_all, with_none, MORE_AT_MOST_MS),
                Figure(_SS, "ms", found[_SS, sockets]),
                ratio(f"{_OURS} to {_SS}", with_all, found[_SS, sockets]),
            ],
        )
    ]


def _took_ms(
    command: Sequence[str], environment: Mapping[str, str], sockets: int, groups: int
) -> float:
    with _held(sockets, groups):
        started_s = time.perf_counter()
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        return 1000 * (time.perf_counter() - started_s)


@contextmanager
def _held(sockets: int, groups: int) -> Iterator[None]:
    """Processes that have so many between them."""
    with ExitStack() as stack:
        for _ in range(PROCESSES if sockets else 0):
            command = [sys.executable, "-c", _HOLDS, str(sockets // PROCESSES), str(groups)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout
            process.stdout.readline()
        yield
