"""`steer attach`, to servers that tests start without steer."""

from __future__ import annotations

import socket
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from testkit.harness import PORT
from testkit.processes import DEADLINE_S, line_of, python, running
from testkit.programs import path
from testkit.service import STEER, Service, launch

HOST = "127.0.0.1"
Attach = Callable[..., Service]
CLIENTS = 4


@contextmanager
def attaching(home: Path, environment: Mapping[str, str]) -> Iterator[Attach]:
    """Starts `steer attach` with some options and waits until it steers; all are ended.

    The name is given to it unless it names itself so.
    """
    with ExitStack() as stack:

        def attach(
            *options: str,
            workers: int | None = None,
            name: str = "attached",
            where: str = f"{HOST}:{PORT}",
            names_itself: bool = False,
            under: Sequence[str] = (),
        ) -> Service:
            records = Path(tempfile.mkdtemp(prefix="records-", dir=home))
            named = () if names_itself else ("--name", name)
            command = [*under, STEER, "attach", where, *named, *options]
            process = launch(command, environment=environment, home=home, records=records)
            started = Service(process, name, home, records, environment)
            stack.callback(started.clean_up)
            return started.wait_ready(workers)

        yield attach


@contextmanager
def threads(number: int) -> Iterator[int]:
    """A server with so many listeners, in threads of one process; its pid."""
    command = python(f"import runpy; runpy.run_path({path('listens_in_threads')!r})", HOST, PORT)
    with running(*command, str(number)) as server:
        assert line_of(server) == "here"
        yield server.pid


def ask(hold: bool = False) -> tuple[str, socket.socket]:
    """Which listener answers a new connection, and the connection."""
    sock = socket.create_connection((HOST, PORT), DEADLINE_S)
    sock.sendall(b"h" if hold else b"x")
    return sock.recv(100).decode(), sock


def answers(number: int) -> Counter[str]:
    """Which listeners answer so many connections, one after the other."""
    found: Counter[str] = Counter()
    for _ in range(number):
        who, sock = ask()
        reset(sock)
        found[who] += 1
    return found


def reset(sock: socket.socket) -> None:
    """Close a connection at both ends, without TIME_WAIT, which would use up the ports."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def is_even(found: Counter[str], listeners: int, within: int) -> bool:
    """Whether so many listeners answered, no two of them differing by more than `within`."""
    return len(found) == listeners and max(found.values()) - min(found.values()) <= within


class Asking:
    """Clients that connect again and again.

    Attributes:
        failed: connections that were not answered, once it has ended.
    """

    def __init__(self) -> None:
        self.failed = 0
        self.answered = 0


@contextmanager
def asking() -> Iterator[Asking]:
    command = (sys.executable, path("asks_again_and_again"), HOST, str(PORT))
    found = Asking()
    with ExitStack() as stack:
        clients = [stack.enter_context(running(*command)) for _ in range(CLIENTS)]
        assert all(line_of(each) == "here" for each in clients)
        yield found
        for each in clients:
            assert each.stdin
            each.stdin.write("\n")
            each.stdin.flush()
        for each in clients:
            answered, failed = map(int, line_of(each).split())
            found.answered += answered
            found.failed += failed
