"""Commands that were not told of their socket: the port they listen on instead, and the cure."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from conftest import StartService
from support import eventually

from steer import servers
from steer.kernel import elsewhere, proc

APP = """
def wsgi(environ, start_response):
    start_response("200 OK", [])
    return [b""]

async def asgi(scope, receive, send):
    raise NotImplementedError
"""
COMES_ROUND = """
import pathlib, socket, time
metrics = socket.create_server(("127.0.0.1", 8097))
while not pathlib.Path("go").exists():
    time.sleep(0.01)
socket.socket(fileno=3).accept()
"""
SERVERS = Path(sys.executable).parent


def test_forgotten_descriptor_is_said_early(service: StartService, home: Path) -> None:
    (home / "m.py").write_text(APP)
    command = (str(SERVERS / "uvicorn"), "m:asgi", "--port", "8097")
    running = service("-w", "1", "--", *command, ready=False)
    eventually(lambda: "listens on port 8097, and nobody waits on descriptor 3" in running.log)
    assert "; add to its command: --fd {fd}\n" in running.log


def test_ready_of_gunicorn_that_listens_elsewhere_is_not_believed(
    service: StartService, home: Path
) -> None:
    (home / "m.py").write_text(APP)
    (home / "conf.py").write_text("reuse_port = True\nbind = '127.0.0.1:8097'\n")
    command = (str(SERVERS / "gunicorn"), "-c", "conf.py", "-w", "1", "m:wsgi")
    running = service("-w", "1", "--ready-timeout", "6", "--", *command, ready=False)
    assert running.wait() == 3
    said = running.log.partition("steer: start workers: ")[2]
    assert said.startswith("not ready within 6 s: gunicorn (pid ")
    assert ") listens on port 8097, and nobody waits on descriptor 3; leave out reuse_port" in said
    assert "ready\n" not in running.log


def test_another_port_beside_its_own_does_no_harm(service: StartService, home: Path) -> None:
    (home / "server.py").write_text(COMES_ROUND)
    running = service("-w", "1", "--", sys.executable, "server.py", ready=False)
    eventually(lambda: "listens on port 8097" in running.log)
    (home / "go").touch()
    eventually(lambda: "worker 0 ready" in running.log)


def test_finds_ports_but_those_it_was_given() -> None:
    pid, none = os.getpid(), frozenset[int]()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        ports = {sock.getsockname()[1] for sock in (one, other)}
        found = elsewhere.find(pid, none)
        assert found is not None
        assert ports <= set(found.ports)
        found = elsewhere.find(pid, frozenset({proc.socket_inode(one.fileno())}))
        assert found is not None
        assert one.getsockname()[1] not in found.ports


@pytest.mark.parametrize(
    "command, arguments, wanted",
    [
        (("uvicorn", "m:a"), (), "--fd {fd}"),
        ((sys.executable, "-m", "hypercorn", "m:a"), (), "--bind fd://{fd}"),
        (("sh", "-c", "exec gunicorn m:a"), ("gunicorn: master [m:a]",), "reuse_port"),
        (("./mine",), ("./mine",), "LISTEN_FDS"),
        ((), (), "worker.sockets"),
    ],
)
def test_what_to_change(command: tuple[str, ...], arguments: tuple[str, ...], wanted: str) -> None:
    assert wanted in servers.how_to_hand_over(command, arguments)
