"""Servers with several listeners, which run without steer: started, and reloaded their own way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import servers
from bench.servers import HOST, Server, system_tool, tool
from steer.sockets import sock_diag

_NGINX = """
daemon off; worker_processes {workers}; user root; pid {home}/pid; error_log {home}/errors;
worker_shutdown_timeout 5s;
events {{ worker_connections 4096; }}
http {{
    access_log off; client_body_temp_path {home}; proxy_temp_path {home}; fastcgi_temp_path {home};
    uwsgi_temp_path {home}; scgi_temp_path {home};
    server {{ listen {host}:{port} reuseport backlog=2048; return 200 $pid; }}
}}
"""
_HAPROXY = """
global
    nbthread {workers}
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
frontend all
    bind {host}:{port} shards by-thread backlog 2048
    http-request return status 200 content-type text/plain string ok
"""


class Running:
    """A server under way.

    Args:
        home: its configuration is there.
    """

    def __init__(self, kind: Kind, port: int, home: Path) -> None:
        self.kind, self.port, self.home = kind, port, home
        self.workers = kind.workers
        self.process: Server

    def listeners(self) -> int:
        return len(sock_diag.listeners(socket.AF_INET, self.port))


@dataclass(frozen=True)
class Kind:
    """A server.

    Args:
        command: starts it; may write a configuration first.
        reload: its own way; None if it has none.
        workers: at first, each with a listener.
    """

    name: str
    command: Callable[[Running], Sequence[str]]
    reload: Callable[[Running], None] | None = None
    workers: int = 4


@contextlib.contextmanager
def running(kind: Kind, port: int, environment: Mapping[str, str]) -> Iterator[Running]:
    """Start one, wait until all of it answers; it ends with the block."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steer-bench-")))
        started = Running(kind, port, home)
        command = kind.command(started)
        started.process = stack.enter_context(_server(command, started, environment))
        yield started


@contextlib.contextmanager
def _server(
    command: Sequence[str], started: Running, environment: Mapping[str, str]
) -> Iterator[Server]:
    server = Server(command, started.port, environment, started.home / "log")
    try:
        server.first_answer_s()
        while started.listeners() < started.kind.workers:
            servers.get(started.port)
        yield server
    finally:
        started.process.kill()


def _nginx(at: Running) -> Sequence[str]:
    file = at.home / "nginx.conf"
    file.write_text(_NGINX.format(workers=at.workers, home=at.home, host=HOST, port=at.port))
    return [system_tool("nginx"), "-c", str(file)]


def _reload_nginx(at: Running) -> None:
    """With as many workers, and one more or less: so that listeners are opened and closed."""
    at.workers = at.kind.workers - (at.workers == at.kind.workers) * (at.kind.workers // 2)
    _nginx(at)
    os.kill(at.process.pid, signal.SIGHUP)


def _haproxy(at: Running) -> Sequence[str]:
    file = at.home / "haproxy.cfg"
    file.write_text(_HAPROXY.format(workers=at.workers, host=HOST, port=at.port))
    return [system_tool("haproxy"), "-db", "-f", str(file)]


def _reload_haproxy(at: Running) -> None:
    """Start another, which tells the first to finish."""
    command = [*_haproxy(at), "-sf", str(at.process.pid)]
    old, environment = at.process, dict(os.environ)
    at.process = Server(command, at.port, environment, at.home / "log")
    old.wait()


def _gunicorn(at: Running) -> Sequence[str]:
    return [
        *servers.gunicorn(at.port, at.workers, "bench.apps:blocking"),
        "--reuse-port",
        "--log-level",
        "error",
    ]


def _reload_gunicorn(at: Running) -> None:
    os.kill(at.process.pid, signal.SIGHUP)


def _threads(at: Running) -> Sequence[str]:
    module = "bench.listens_in_threads"
    return [sys.executable, "-m", module, HOST, str(at.port), str(at.workers)]


NGINX = Kind("nginx, reuseport", _nginx, _reload_nginx)
HAPROXY = Kind("haproxy, shards", _haproxy, _reload_haproxy, workers=2)
GUNICORN = Kind("gunicorn, --reuse-port", _gunicorn, _reload_gunicorn)
THREADS = Kind("a program with 8 threads", _threads, workers=8)
ALL = (NGINX, HAPROXY, GUNICORN, THREADS)


@contextlib.contextmanager
def attached(at: Running, environment: Mapping[str, str], *options: str) -> Iterator[Server]:
    """`steer attach` to it, from when it steers to the end of the block."""
    from steer.control import client
    from steer.errors import ControlError

    name = servers.name(at.port)
    command = [tool("steer"), "attach", f"{HOST}:{at.port}", "--name", name, *options]
    path = Path(environment["STEER_RUNTIME_DIR"], f"{name}.sock")
    attacher = Server(command, at.port, environment, at.home / "attacher")
    try:
        while True:
            with contextlib.suppress(ControlError):
                client.status(path)
                break
            if attacher.process.poll() is not None:
                raise attacher.failure(f"exit status {attacher.process.returncode}")
        yield attacher
        if attacher.process.poll() is None:
            attacher.stop()
    finally:
        attacher.kill()
