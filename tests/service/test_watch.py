"""`steer status --watch`, and the connection that stays open for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from steer.control import client, peer
from steer.control.protocol import CONNECTIONS_MAX, SILENT_MAX
from steer.control.server import Progress
from steer.errors import ControlError, NotRunning
from steer.linux import processes
from testkit.fake_service import fake_service
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually, is_ready
from testkit.service import STEER

STATUS = b'{"command": "status", "stay": true}\n'


async def answers(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
    return {"service": {}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "web.sock"


def read_line(sock: socket.socket) -> bytes:
    sock.settimeout(DEADLINE_S)
    with sock.makefile("rb") as stream:
        return stream.readline()


# Who answers


def test_a_connection_may_stay_for_more(place: Path) -> None:
    with fake_service(place, status=answers), peer.connect(place, DEADLINE_S) as sock:
        for _ in range(3):
            sock.sendall(STATUS)
            assert json.loads(read_line(sock)) == {"ok": True, "service": {}}
        sock.sendall(STATUS.replace(b"true", b"false"))
        assert json.loads(read_line(sock))["ok"]
        assert read_line(sock) == b""


def test_what_stays_does_not_keep_a_service_from_its_end(place: Path) -> None:
    with ExitStack() as stack:
        with fake_service(place, status=answers):
            sock = stack.enter_context(peer.connect(place, DEADLINE_S))
            sock.sendall(STATUS)
            read_line(sock)
        assert read_line(sock) == b""


def test_those_that_stay_make_room_for_others(place: Path) -> None:
    with fake_service(place, status=answers), ExitStack() as stack:
        staying = []
        for _ in range(2 * CONNECTIONS_MAX):
            sock = stack.enter_context(peer.connect(place, DEADLINE_S))
            sock.sendall(STATUS)
            assert json.loads(read_line(sock))["ok"]
            staying.append(sock)
        eventually(lambda: len([each for each in staying if is_open(each)]) <= SILENT_MAX)
        assert is_open(staying[-1])


def is_open(sock: socket.socket) -> bool:
    return not is_ready(sock)


# Who asks


@contextmanager
def counting(place: Path, *answers_to_each: int) -> Iterator[list[int]]:
    """Answers so many requests on each connection, then closes it; how many there were on each."""
    asked: list[int] = []

    def serve() -> None:
        for most in answers_to_each:
            connection, _ = sock.accept()
            asked.append(0)
            with connection, connection.makefile("rb") as lines:
                for _, _line in zip(range(most), lines, strict=False):
                    asked[-1] += 1
                    connection.sendall(b'{"ok": true}\n')

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place))
        sock.listen()
        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        thread.join(DEADLINE_S)


@pytest.fixture
def kept() -> Iterator[client.Connections]:
    with closing(client.Connections()) as made:
        yield made


def test_all_is_asked_by_one_connection(place: Path, kept: client.Connections) -> None:
    with counting(place, 5) as asked:
        for _ in range(5):
            assert client.ask(place, "status", connections=kept) == {"ok": True}
    assert asked == [5]


def test_one_that_was_closed_is_made_again(place: Path, kept: client.Connections) -> None:
    with counting(place, 1, 2, 1) as asked:
        for _ in range(4):
            assert client.ask(place, "status", connections=kept) == {"ok": True}
            assert kept.listener(place) in (os.getpid(), None)
    assert asked == [1, 2, 1]
    with pytest.raises(NotRunning):
        client.ask(place, "status", connections=kept)


def test_an_answer_of_something_else_is_told_as_such(place: Path, kept: client.Connections) -> None:
    async def odd(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        return {"service": {"name": 7}}

    with fake_service(place, status=odd), pytest.raises(ControlError, match="not understood"):
        client.status(place, kept)


# Both


@pytest.mark.needs("netns")
@pytest.mark.parametrize("name", [("test",), ()])
def test_watching_keeps_its_connection_and_follows_the_next_controller(
    service: StartService, environment: dict[str, str], name: tuple[str, ...]
) -> None:
    running = service("-w", "1", "--policy", "hash")
    command = [STEER, "status", *name, "--watch", "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as watching:
        try:
            told = reports(watching)
            (first,) = next(told)["services"]
            before = connections(watching.pid)
            assert len(before) == 1
            next(told)
            next(told)
            assert connections(watching.pid) == before
            running.send_signal(signal.SIGUSR2)
            uptime_s = first["uptime_s"]
            for each in told:
                (seen,) = each["services"]
                assert (seen["name"], seen["pid"]) == ("test", running.pid)
                if connections(watching.pid).isdisjoint(before):
                    break
            assert seen["uptime_s"] > uptime_s
        finally:
            watching.kill()


def connections(pid: int) -> set[int]:
    return {inode for _, inode in processes.sockets_by_fd(pid)}


def reports(watching: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert watching.stdout is not None
    lines: list[str] = []
    for line in watching.stdout:
        lines.append(line)
        if line == "}\n":
            yield json.loads("".join(lines))
            lines = []
