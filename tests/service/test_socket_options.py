"""Options that a service sets on its sockets, seen from inside its workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from steer.config.socket_options import OPTIONS
from steer.sockets import sock_diag
from testkit.clients import udp_ask
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.namespaces import Netns
from testkit.option_values import ALL
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source
from testkit.service import Service

HOST, PORT = "127.0.0.1", 8080
_MSG_FASTOPEN = 0x20000000  # include/linux/socket.h
CALLABLE = source("tells_options")
ACCEPTED = {
    "nodelay": 0,
    "keepalive": 1,
    "keepidle": 77,
    "keepintvl": 11,
    "keepcnt": 5,
    "user-timeout": 12500,
    "notsent-lowat": 16384,
    "congestion": "reno",
    "fastopen": True,
    # The kernel doubles them, for what it needs itself (socket(7)).
    "rcvbuf": 200_000,
    "sndbuf": 122_880,
    "mark": 7,
    "priority": 0,
    "transparent": 1,
}
BOUND = {
    "rcvbuf": 200_000,
    "sndbuf": 122_880,
    "mark": 7,
    "priority": 5,
    "keepalive": 0,
    "transparent": 1,
}


def arguments(options: dict[str, str]) -> Sequence[str]:
    return [
        word for name, value in options.items() for word in ("--socket-option", f"{name}={value}")
    ]


def begin(clients: ExitStack, data: bytes = b"?") -> socket.socket:
    """Connect and send, with the SYN if a cookie for that is there."""
    sock = clients.enter_context(socket.socket())
    sock.sendto(data, _MSG_FASTOPEN, (HOST, PORT))
    sock.settimeout(DEADLINE_S)
    return sock


def answer(sock: socket.socket) -> dict[str, Any]:
    with sock.makefile("rb") as stream:
        found: dict[str, Any] = json.loads(stream.read())
    return found


def kill_workers(running: Service) -> None:
    for worker in running.workers():
        os.kill(worker["pid"], signal.SIGKILL)


def through_backup(running: Service, home: Path, clients: ExitStack) -> dict[str, Any]:
    """What is answered to a connection that waited while there was no worker."""
    (home / "not-yet").touch()
    before = {worker["pid"] for worker in running.workers()}
    kill_workers(running)
    eventually(lambda: not before & {worker["pid"] for worker in running.workers()})
    eventually(lambda: {each["state"] for each in running.workers()} == {"starting"})
    waiting = begin(clients)
    (home / "not-yet").unlink()
    found = answer(waiting)
    running.wait_ready()
    return found


@pytest.mark.needs("root", "bpf", "migrate")
def test_accepted_sockets_have_them_also_after_a_backup_listener_a_reload_and_adoption(
    service: StartService, netns: Netns, home: Path, clients: ExitStack
) -> None:
    assert ALL.keys() == OPTIONS.keys()
    netns.sysctl("net.ipv4.tcp_fastopen", 3)
    (home / "app.py").write_text(CALLABLE)
    file = home / "steer.toml"
    both = f'bind = ["{HOST}:{PORT}", "udp://{HOST}:{PORT}"]'

    def write(options: dict[str, str]) -> None:
        given = json.dumps([f"{name}={value}" for name, value in options.items()])
        file.write_text(
            f'[service]\napp = "app:serve"\n{both}\nsocket_options = {given}\n'
            f"backlog = {1000 + len(options)}\n"
        )

    def backlogs() -> set[int]:
        found = sock_diag.waiting("tcp", socket.AF_INET, PORT)
        return {each.limit for each in found.values()}

    def seen(sock: socket.socket) -> dict[str, Any]:
        return {key: value for key, value in answer(sock).items() if key != "slot"}

    write(ALL)
    running = service("-w", "2", "--policy", "round-robin", "--hang-timeout", "0")
    begin(clients).close()  # for the cookie
    assert seen(begin(clients)) == ACCEPTED
    over_udp = udp_ask(HOST, PORT)
    assert {key: over_udp[key] for key in BOUND} == BOUND
    found = through_backup(running, home, clients)
    assert {key: found[key] for key in ACCEPTED} == ACCEPTED

    # Backup listeners belong to no generation: they have to become as its workers are.
    write({"keepidle": "88"})
    assert backlogs() == {1000 + len(ALL)}
    assert running.steer("reload").returncode == 0
    assert eventually(backlogs, {1001})
    changed = {"nodelay": 1, "keepalive": 0, "keepidle": 88, "mark": 0, "fastopen": False}
    for found in (seen(begin(clients)), through_backup(running, home, clients)):
        assert {key: found[key] for key in changed} == changed

    running.send_signal(signal.SIGKILL)
    running.wait()
    adopted = service("-w", "2", "--policy", "round-robin", "--hang-timeout", "0")
    assert "adopted 2 workers" in adopted.log
    write({"keepidle": "99"})
    assert adopted.steer("reload").returncode == 0
    for found in (seen(begin(clients)), through_backup(adopted, home, clients)):
        assert found["keepidle"] == 99


@pytest.mark.parametrize("backend", ["cbpf", "kernel"])
def test_they_are_set_on_every_backend(
    service: StartService, home: Path, clients: ExitStack, backend: str
) -> None:
    (home / "app.py").write_text(CALLABLE)
    both = ("-b", f"{HOST}:{PORT}", "-b", f"udp://{HOST}:{PORT}")
    chosen = ("--policy", "hash", "--backend", backend, *arguments({"keepidle": "77"}))
    service("-w", "1", *both, *chosen, "app:serve")
    found = answer(begin(clients))
    assert (found["nodelay"], found["keepidle"]) == (1, 77)


ASGI = source("tells_options_of_clients")
WORKERS = {
    "uvicorn": (
        *("--", sys.executable, "-m", "uvicorn", "--fd", "{fd}", "--loop", "asyncio"),
        *("--lifespan", "off", "app:app"),
    ),
    "asyncio": ("app:serve",),
}


@pytest.mark.parametrize(
    "worker", [pytest.param("uvicorn", marks=pytest.mark.needs("uvicorn")), "asyncio"]
)
def test_what_a_worker_writes_is_sent_at_once(
    service: StartService, home: Path, worker: str
) -> None:
    """asyncio sets TCP_NODELAY only where a socket's object says IPPROTO_TCP, which that of a
    descriptor that was handed over does not: with head and body written apart, each request
    of a kept connection took 40 ms."""
    (home / "app.py").write_text(ASGI)
    service("-w", "1", *WORKERS[worker])
    with socket.create_connection((HOST, PORT), DEADLINE_S) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with sock.makefile("rb") as stream:
            assert json.loads(stream.read().partition(b"\r\n\r\n")[2])["nodelay"] == 1


@pytest.mark.needs("root", "bpf", "migrate")
def test_a_connection_that_is_deferred_is_no_hang_and_outlives_a_reload(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    (home / "app.py").write_text(CALLABLE)
    both = ("-b", f"{HOST}:{PORT}", "-b", f"udp://{HOST}:{PORT}")
    chosen = ("--policy", "least-conn", "--hang-timeout", "0.2", "-w", "2")
    running = service(*both, *chosen, *arguments({"defer-accept": "60"}), "app:serve")
    before = {worker["pid"] for worker in running.workers()}
    silent = [clients.enter_context(socket.create_connection((HOST, PORT))) for _ in range(8)]
    # Nobody gets them yet, and each worker has got as many.
    eventually(lambda: sum(running.selected().values()), len(silent))
    assert list(running.selected().values()) == [4, 4]
    eventually(lambda: running.status()["uptime_s"] > 1)
    assert {worker["pid"] for worker in running.workers()} == before
    assert {each["state"] for each in running.workers()} == {"ready"}

    assert running.steer("reload").returncode == 0
    for sock in silent:
        sock.sendall(b"?")
    for sock in silent:
        sock.settimeout(DEADLINE_S)
        assert "slot" in answer(sock)  # of a new worker, or of an old one that still finishes


@pytest.mark.parametrize(
    "given, says",
    [
        ("mark=7", "set socket option mark=7 on tcp 127.0.0.1:8080: EPERM; needs CAP_NET_ADMIN"),
        ("transparent=yes", "transparent=yes on tcp 127.0.0.1:8080: EPERM; needs CAP_NET_ADMIN or"),
        ("congestion=nope", "congestion=nope on tcp 127.0.0.1:8080: ENOENT; this kernel has no"),
    ],
)
def test_what_the_kernel_refuses_is_told_by_name_before_anything_starts(
    steer: RunSteer, given: str, says: str
) -> None:
    for command in ("check", "run"):
        found = steer(command, "--name", "test", "--socket-option", given, user=NOBODY)
        assert (found.returncode, says in found.stderr) == (1, True), found.stderr
    found = steer("doctor", "--json", "--socket-option", given, user=NOBODY)
    (told,) = (x for x in json.loads(found.stdout)["findings"] if x["topic"] == "socket-options")
    assert told["verdict"] == "fail"
    assert f"{told['found']}; {told['cure']}".startswith(f"set socket option {given}")


def test_what_the_kernel_would_not_do_is_told(
    steer: RunSteer, service: StartService, netns: Netns
) -> None:
    netns.sysctl("net.ipv4.tcp_fastopen", 1)
    netns.sysctl("net.core.somaxconn", 100)
    asked = arguments({"rcvbuf": "1000M", "fastopen": "200"})
    words = (
        "rcvbuf=1000M: limited to ",
        "fastopen=200: limited to 100 by net.core.somaxconn; sysctl -w net.core.somaxconn=200",
        "fastopen=200: not answered while net.ipv4.tcp_fastopen is 1",
    )
    checked = steer("check", *asked)
    assert checked.returncode == 0, checked.stderr
    examined = steer("doctor", *asked, "--json").stdout
    findings = json.loads(examined)["findings"]
    found = [each for each in findings if each["topic"] == "socket-options"]
    assert [each["verdict"] for each in found] == ["warn"] * 3
    running = service("-w", "1", *asked)
    for word, finding in zip(words, found, strict=True):
        assert f"note: {word}" in checked.stdout
        assert f"socket option {word}" in running.log
        assert finding["cure"].startswith("sysctl -w ")


@pytest.mark.needs("root")
@pytest.mark.parametrize("away", ["198.51.100.7", "2001:db8::7"])
def test_transparent_binds_to_an_address_that_is_not_local(
    service: StartService, steer: RunSteer, away: str
) -> None:
    bind = f"[{away}]:8080" if ":" in away else f"{away}:8080"
    refused = steer("check", "-b", bind)
    assert refused.returncode == 1
    assert f"bind tcp {bind}: EADDRNOTAVAIL" in refused.stderr
    running = service("-b", bind, "-w", "2", *arguments({"transparent": "yes"}))
    assert [each["address"] for each in running.status()["binds"]] == [away]


@pytest.mark.needs("root")
def test_a_reload_with_one_that_is_refused_changes_nothing(
    service: StartService, home: Path
) -> None:
    running = service("-w", "1")
    (home / "steer.toml").write_text('[service]\nsocket_options = ["congestion=nope"]\n')
    reloaded = running.steer("reload")
    assert reloaded.returncode == 1
    assert "set socket option congestion=nope on tcp 127.0.0.1:8080: ENOENT" in reloaded.stderr
    assert "nothing has changed: generation 1 serves on" in reloaded.stderr
    assert running.status()["generation"] == 1
