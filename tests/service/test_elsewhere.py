"""Commands that were not told of their socket: the port they listen on instead, and the cure."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest

from steer.config import servers
from steer.linux import processes
from steer.sockets import elsewhere
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source

APP = source("answers_asgi_and_wsgi")
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


NGINX = """
events {}
http { server { listen 127.0.0.1:8080; access_log off; location / { return 200 "{}"; } } }
"""
NGINX_ELSEWHERE = NGINX.replace("8080", "8097 reuseport")
HAPROXY = """
defaults
    mode http
    timeout connect 9s
    timeout client 9s
    timeout server 9s
frontend in
    bind 127.0.0.1:8097
    http-request return status 200 content-type text/plain string {}
"""
ELSEWHERE = {
    "uvicorn": ("--", "uvicorn", "m:asgi", "--port", "8097"),
    "hypercorn": ("--", "hypercorn", "m:asgi", "--bind", "127.0.0.1:8097"),
    "gunicorn": ("--", "gunicorn", "-b", "127.0.0.1:8097", "--reuse-port", "m:wsgi"),
    "gunicorn, wrapped": ("--", "{home}/wrap", "gunicorn", "-b", "127.0.0.1:8097", "m:wsgi"),
    "nginx": ("--", "nginx", "-c", "{home}/nginx.conf", "-g", "daemon off; pid {home}/{{slot}};"),
    "haproxy": ("--", "haproxy", "-db", "-f", "{home}/haproxy.cfg"),
    "waitress": ("--", "waitress-serve", "--listen", "127.0.0.1:8097", "m:wsgi"),
}
"""The ends of a `steer run` without what its server needs."""


def put_right(arguments: list[str], told: str, home: Path) -> list[str]:
    """What it is told to do, done to the letter."""
    if added := re.search(r"add to its command: (.+)", told):
        return [*arguments, *shlex.split(added[1])]
    if instead := re.search(r"give it (.+), and no other (--\w+)", told):
        at = arguments.index(instead[2])
        return [*arguments[:at], *arguments[at + 2 :], *shlex.split(instead[1])]
    if left_out := re.search(r"leave out (\w+)", told):
        return [each for each in arguments if each != f"--{left_out[1].replace('_', '-')}"]
    if of_steer := re.search(r"give steer (-e .+), and nginx the same address", told):
        (home / "nginx.conf").write_text(NGINX)
        return [*shlex.split(of_steer[1]), *arguments]
    if line := re.search(r"write in its configuration: (.+)", told):
        (home / "haproxy.cfg").write_text(HAPROXY.replace("bind 127.0.0.1:8097", line[1]))
        return arguments
    assert "steer run --server waitress MODULE:NAME" in told
    return ["--server", "waitress", "m:wsgi"]


@pytest.mark.parametrize(
    "server",
    [pytest.param(name, marks=pytest.mark.needs(name.split(",")[0])) for name in ELSEWHERE],
)
def test_what_is_told_puts_it_right(service: StartService, home: Path, server: str) -> None:
    """With the servers as they are."""
    (home / "m.py").write_text(APP)
    (home / "nginx.conf").write_text(NGINX_ELSEWHERE)
    (home / "haproxy.cfg").write_text(HAPROXY)
    (home / "wrap").write_text('#!/bin/sh\n"$@"\nexit\n')
    (home / "wrap").chmod(0o755)
    arguments = [word.format(home=home) if "{home}" in word else word for word in ELSEWHERE[server]]
    arguments = [str(SERVERS / word) if (SERVERS / word).is_file() else word for word in arguments]
    wrong = service("-w", "2", *arguments, ready=False)
    listens = "listens on port 8097, and nobody waits on descriptor 3; "
    eventually(lambda: listens in wrong.log)
    told = wrong.log.partition(listens)[2].splitlines()[0]
    wrong.stop()
    right = service("-w", "2", *put_right(arguments, told, home))
    with socket.create_connection(("127.0.0.1", 8080), DEADLINE_S) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 200 " in client.makefile("rb").readline()
    assert right.stop() == 0


@pytest.mark.needs("uvicorn")
def test_one_error_however_many_find_the_address_in_use(service: StartService, home: Path) -> None:
    """One worker listens, and the others wait for what becomes of it."""
    (home / "m.py").write_text(APP)
    command = (str(SERVERS / "uvicorn"), "m:asgi", "--port", "8097")
    wrong = service("-w", "4", "--ready-timeout", "9", "--", *command, ready=False)
    assert wrong.wait() == 3
    told = wrong.log.partition("steer: start workers: ")[2].splitlines()[0]
    assert "listens on port 8097, and nobody waits on descriptor 3; add to its comm" in told
    assert wrong.log.count("add to its command") <= 2
    assert wrong.log.count("exit status") <= 1
    assert wrong.log.count("Started server process") <= 9


@pytest.mark.needs("granian")
def test_one_that_takes_no_socket_is_told_so(service: StartService, home: Path) -> None:
    (home / "m.py").write_text(APP)
    command = (str(SERVERS / "granian"), "--interface", "asgi", "--port", "8097", "m:asgi")
    wrong = service("-w", "1", "--", *command, ready=False)
    listens = "listens on port 8097, and nobody waits on descriptor 3; it takes no socket"
    eventually(lambda: listens in wrong.log)
    wrong.stop()


@pytest.mark.parametrize(
    "server",
    [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("uvicorn", "waitress")],
)
def test_one_that_binds_the_address_of_the_service(
    service: StartService, home: Path, server: str
) -> None:
    """As when it was told the same address as steer."""
    (home / "m.py").write_text(APP)
    command = [word.replace("8097", "8080") for word in ELSEWHERE[server][1:]]
    command[0] = str(SERVERS / command[0])
    wrong = service("-w", "3", "--", *command, ready=False)
    assert wrong.wait() == 3
    told = wrong.log.partition("steer: start workers: ")[2].splitlines()[0]
    assert ": it binds an address itself, which is in use; " in told
    assert servers.LISTEN_CURES[server] in told
    assert wrong.log.count("[WARNING] worker") <= 1


IN_THE_BACKGROUND = {
    "nginx": ("nginx", "-c", "{home}/nginx.conf", "-g", "pid {home}/{{slot}};"),
    "haproxy": ("haproxy", "-D", "-f", "{home}/haproxy.cfg"),
    "gunicorn": ("gunicorn", "--daemon", "m:wsgi"),
}


@pytest.mark.parametrize(
    "server", [pytest.param(name, marks=pytest.mark.needs(name)) for name in IN_THE_BACKGROUND]
)
def test_one_that_goes_to_the_background(service: StartService, home: Path, server: str) -> None:
    (home / "m.py").write_text(APP)
    (home / "nginx.conf").write_text(NGINX_ELSEWHERE)
    (home / "haproxy.cfg").write_text(HAPROXY.replace("bind 127.0.0.1:8097", "bind fd@3"))
    command = [word.format(home=home) for word in IN_THE_BACKGROUND[server]]
    if (SERVERS / command[0]).exists():
        command[0] = str(SERVERS / command[0])
    wrong = service("-w", "1", "--", *command, ready=False)
    assert wrong.wait() == 3
    told = wrong.log.partition("steer: start workers: ")[2].splitlines()[0]
    ended = "exit status 0: its first process exited while it should serve; "
    assert told == f"{ended}{servers.FOREGROUND_CURES[server]}"


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
        found = elsewhere.find(pid, frozenset({processes.socket_inode(one.fileno())}))
        assert found is not None
        assert one.getsockname()[1] not in found.ports
