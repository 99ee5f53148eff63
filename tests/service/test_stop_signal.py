"""Servers that finish on another signal than SIGTERM: a reload cuts none of their requests."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from signal import Signals

import pytest

from steer.config.servers import SERVERS
from steer.config.service import Service
from testkit.fixtures import RunSteer, StartService
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source
from testkit.service import Service as Running

HOST, PORT, BEHIND = "127.0.0.1", 8080, 8081
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
NGINX = f"""
daemon off;
worker_processes 1;
error_log stderr crit;
events {{}}
http {{
    access_log off;
    server {{
        listen {HOST}:{PORT};
        location / {{ proxy_pass http://{HOST}:{BEHIND}; }}
    }}
}}
"""
HAPROXY = f"""
defaults
    mode http
    timeout connect 60s
    timeout client 60s
    timeout server 60s
frontend in
    bind fd@3
    default_backend behind
backend behind
    server one {HOST}:{BEHIND}
"""
COMMANDS = {
    # NGINX is its own name for inherited listeners, from before there was LISTEN_FDS.
    "nginx": (
        *("-e", "NGINX=3;", "--", "nginx", "-c", "{home}/nginx.conf"),
        *("-g", "pid {home}/{{slot}}.pid;"),
    ),
    "haproxy": ("--", "haproxy", "-db", "-f", "{home}/haproxy.cfg"),
}
each_server = pytest.mark.parametrize(
    "server", [pytest.param(name, marks=pytest.mark.needs(name)) for name in COMMANDS]
)


class Behind:
    """A server behind others, that answers when it is told to.

    Attributes:
        waiting: for an answer.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, BEHIND), backlog=64)
        self.waiting: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self.waiting.append(self._listener.accept()[0])

    def answer(self) -> None:
        for sock in self.waiting:
            with sock:
                sock.recv(65536)
                with suppress(OSError):
                    sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for sock in (self._listener, *self.waiting):
            sock.close()


@pytest.fixture
def behind(netns: Netns) -> Iterator[Behind]:
    made = Behind()
    yield made
    made.close()


@pytest.fixture
def command(home: Path, server: str) -> Sequence[str]:
    """The end of a `steer run`."""
    (home / "nginx.conf").write_text(NGINX)
    (home / "haproxy.cfg").write_text(HAPROXY)
    return [word.format(home=home) for word in COMMANDS[server]]


def under_way(clients: ExitStack, behind: Behind, number: int = 6) -> list[socket.socket]:
    """Requests that are not answered yet."""
    socks = []
    for _ in range(number):
        sock = clients.enter_context(socket.create_connection((HOST, PORT), DEADLINE_S))
        sock.sendall(REQUEST)
        socks.append(sock)
    eventually(lambda: len(behind.waiting) == number)
    return socks


def answered(socks: Sequence[socket.socket]) -> int:
    def whole(sock: socket.socket) -> bytes:
        with sock, sock.makefile("rb") as stream, suppress(ConnectionError):
            return stream.read()
        return b""

    return [whole(sock).endswith(b"ok") for sock in socks].count(True)


@each_server
def test_a_reload_lets_it_finish_all_requests(
    service: StartService,
    behind: Behind,
    clients: ExitStack,
    home: Path,
    server: str,
    command: Sequence[str],
) -> None:
    running = service("-w", "2", *command)
    old = {worker["pid"] for worker in running.workers()}
    requests = under_way(clients, behind)
    assert running.steer("reload").returncode == 0
    eventually(
        lambda: {each["pid"] for each in running.workers() if each["state"] == "ready"} - old
    )
    behind.answer()
    assert answered(requests) == len(requests)
    eventually(lambda: not old & {worker["pid"] for worker in running.workers()})
    the_guard_lets_it_finish(running, behind, clients)


STARTERS = {
    "env": ("env", "A=1"),
    "nice": ("nice", "-n", "1"),
    "tini": ("tini", "-s", "--"),
    "dumb-init": ("dumb-init",),
    "setsid": ("setsid", "-w"),
    "sh": ("sh", "-c", '"$@"; true', "sh"),
}
PASS_NOTHING_ON = ("setsid", "sh")
EVERYWHERE = ("env", "nice", "sh")
each_starter = pytest.mark.parametrize(
    "starter",
    [
        pytest.param(name, marks=() if name in EVERYWHERE else pytest.mark.needs(name))
        for name in STARTERS
    ],
)


@each_server
@each_starter
def test_a_reload_lets_it_finish_below_another_program(
    service: StartService,
    behind: Behind,
    clients: ExitStack,
    server: str,
    command: Sequence[str],
    starter: str,
) -> None:
    at = command.index("--") + 1
    running = service("-w", "2", *command[:at], *STARTERS[starter], *command[at:])
    old = {worker["pid"] for worker in running.workers()}
    requests = under_way(clients, behind)
    assert running.steer("reload").returncode == 0
    number = SERVERS[server].stop_signal.name
    said = f"workers are told to finish by {number}, as they run {server}, which ends at once on"
    eventually(lambda: said in running.log)
    by_two = f"; {starter}, which starts it, by SIGTERM before\n" in running.log
    assert by_two == (starter in PASS_NOTHING_ON)
    behind.answer()
    assert answered(requests) == len(requests)
    eventually(lambda: not old & {worker["pid"] for worker in running.workers()})
    if starter not in PASS_NOTHING_ON:
        the_guard_lets_it_finish(running, behind, clients)


def the_guard_lets_it_finish(running: Running, behind: Behind, clients: ExitStack) -> None:
    """Without a controller it is the guard that ends them, and as gracefully."""
    behind.waiting.clear()
    requests = under_way(clients, behind)
    running.send_signal(signal.SIGKILL)
    running.wait()
    stopping = threading.Thread(target=running.steer, args=("stop",))
    stopping.start()
    eventually(lambda: "ending 2 workers" in running.log)
    behind.answer()
    assert answered(requests) == len(requests)
    stopping.join()


@pytest.mark.needs("nginx")
@pytest.mark.parametrize("server", ["nginx"])
def test_a_signal_of_choice_wins_over_what_runs(
    service: StartService, behind: Behind, clients: ExitStack, command: Sequence[str]
) -> None:
    at = command.index("--")
    chosen = ("--stop-signal", "TERM", *command[:at], "--", "env", *command[at + 1 :])
    running = service("-w", "1", *chosen)
    requests = under_way(clients, behind)
    assert running.steer("reload").returncode == 0
    assert answered(requests) == 0  # ended at once
    assert "told to finish by" not in running.log


@pytest.mark.needs("nginx")
@pytest.mark.parametrize("server", ["nginx"])
def test_a_quick_stop_is_by_sigterm(
    service: StartService, behind: Behind, clients: ExitStack, home: Path, command: Sequence[str]
) -> None:
    """On which nginx ends at once, and removes its pid file; killed it would leave that."""
    running = service("-w", "2", *command)
    under_way(clients, behind)
    assert sorted(home.glob("*.pid")) == [home / "0.pid", home / "1.pid"]
    running.send_signal(signal.SIGTERM)
    eventually(lambda: "stopping gracefully" in running.log)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert not list(home.glob("*.pid"))


def test_one_that_is_not_ready_yet_is_ended_by_sigterm(service: StartService) -> None:
    """SIGWINCH it would not notice (signal(7): by default it is ignored)."""
    chosen = ("--stop-signal", "WINCH", "--graceful-timeout", "1")
    running = service("-w", "1", *chosen, "--", "sleep", "1000", ready=False)
    eventually(lambda: "1 worker" in running.log and running.workers())
    assert running.stop() == 0
    assert "not finished in time" not in running.log


CALLABLE = source("ends_on_a_signal")


@pytest.mark.parametrize("adopt_timeout", ["0", "30"])
def test_a_callable_is_told_by_the_signal_of_choice(
    service: StartService, home: Path, adopt_timeout: str
) -> None:
    (home / "app.py").write_text(CALLABLE)
    running = service(
        *("-w", "2", "--stop-signal", "usr2", "--adopt-timeout", adopt_timeout, "app:serve")
    )
    if adopt_timeout == "0":
        running.send_signal(signal.SIGKILL)  # the kernel tells them, and the guard
        running.wait()
        running.leaves_nothing()
    else:
        assert running.stop() == 0
    assert not (home / "terminated").exists()
    assert sorted(home.glob("finished-*")) == [home / "finished-0", home / "finished-1"]


@pytest.mark.needs("nginx")
def test_check_tells_it(steer: RunSteer) -> None:
    told = "note: workers are told to finish by SIGQUIT, as nginx ends at once on SIGTERM\n"
    assert told in steer("check", "--", "nginx").stdout
    assert "told to finish" not in steer("check", "--stop-signal", "TERM", "--", "nginx").stdout


@pytest.mark.parametrize(
    "command, number",
    [
        ((), signal.SIGTERM),
        (("uvicorn", "app:app"), signal.SIGTERM),
        (("/usr/sbin/nginx", "-g", "daemon off;"), signal.SIGQUIT),
        (("haproxy", "-db"), signal.SIGUSR1),
        (("/usr/sbin/php-fpm8.2", "-F"), signal.SIGQUIT),
        (("php-fpm-8.2",), signal.SIGQUIT),
        (("apache2", "-DFOREGROUND"), signal.SIGWINCH),
        (("nginx-prometheus-exporter",), signal.SIGTERM),
    ],
)
def test_known_servers_are_told_by_their_own_signal(
    command: tuple[str, ...], number: Signals
) -> None:
    assert Service(command=command).finish_signal is number
    assert Service(command=command, stop_signal="SIGHUP").finish_signal is signal.SIGHUP
