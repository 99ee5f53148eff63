"""The servers that steer is compared with: a row each, and one running.

All have WORKERS workers and the same tiny application: as WSGI for gunicorn and its plain sync
worker, as ASGI for the others; nginx has none and answers by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bench import servers
from bench.servers import HOST, Server, tool
from steer.control import client, find
from steer.errors import ControlError, NotRunning, SteerError
from steer.linux import processes

T = TypeVar("T")
WORKERS = 4
_PATIENCE_S = 60.0
_LOOK_AGAIN_S = 0.02
_MARK = "BENCH_PEER"
_NGINX = "nginx.conf"
_NGINX_CONF = """
daemon off;
worker_processes {workers};
pid {directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    server {{
        listen {host}:{port} reuseport;
        location / {{ return 200 "hello\\n"; }}
    }}
}}
"""


@dataclass(frozen=True)
class Site:
    """Where one runs.

    Args:
        directory: empty, and its own.
        environment: by a mark in it we know all that descend from it.
    """

    port: int
    directory: Path
    environment: Mapping[str, str]

    @property
    def log(self) -> Path:
        """What it writes."""
        return self.directory / "log"


@dataclass(frozen=True)
class Peer:
    """How one is run.

    Args:
        command: what to execute.
        reload: replaces all workers; returns once the old have gone. None: it cannot.
        scale: has so many workers instead; returns once it has. None: it cannot.
        workers: the processes that serve.
    """

    name: str
    command: Callable[[Site], list[str]]
    reload: Callable[[Running], None] | None
    scale: Callable[[Running, int], None] | None
    workers: Callable[[Running], list[int]]
    is_steer: bool = False


@dataclass(frozen=True)
class Running:
    """A peer that has all its workers, or had them when it was started."""

    peer: Peer
    site: Site
    server: Server

    def workers(self) -> list[int]:
        """Who serves; oldest first, which makes a turn of always taking the first."""
        born = {pid: processes.start_time_ticks(pid) for pid in self.peer.workers(self)}
        return sorted((pid for pid in born if born[pid]), key=lambda pid: (born[pid] or 0, pid))

    def has_ended(self) -> bool:
        return self.server.process.poll() is not None

    def wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        """Raises SteerError: it is not so in a minute, or it has ended."""
        until_s = time.monotonic() + _PATIENCE_S
        while not is_so():
            if self.has_ended() or time.monotonic() > until_s:
                cause = "it ended" if self.has_ended() else f"not so in {_PATIENCE_S:g} s"
                raise self.server.failure(f"waited for {what}: {cause}")
            time.sleep(_LOOK_AGAIN_S)

    def wait_for_workers(self, count: int, but: Iterable[int] = ()) -> None:
        """Until there are so many, none of them one of `but`."""
        gone = set(but)

        def is_so() -> bool:
            now = self.workers()
            return len(now) == count and not gone.intersection(now)

        self.wait_for(is_so, f"{count} workers")


@contextlib.contextmanager
def started(
    peer: Peer, port: int, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start one, and wait for nothing; it and all that it started are killed after the block.

    Args:
        environment: more variables for it.
    """
    mark = {_MARK: f"{os.getpid()}-{port}"}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="steer-bench-"))
        stack.callback(_kill_all, mark)
        all_of_it = servers.environment(directory, **mark, **(environment or {}))
        site = Site(port, Path(directory), all_of_it)
        server = Server(peer.command(site), port, site.environment, site.log)
        stack.callback(server.kill)
        yield Running(peer, site, server)


@contextlib.contextmanager
def running(
    peer: Peer, port: int, environment: Mapping[str, str] | None = None, workers: int = WORKERS
) -> Iterator[Running]:
    """As `started`, once it has all its workers.

    Raises:
        SteerError: it does not start.
    """
    with started(peer, port, environment) as it:
        if not peer.is_steer:
            it.server.first_answer_s()
        it.wait_for_workers(workers)
        yield it


def each(peers: Sequence[Peer], measure: Callable[[Peer], T], failures: list[str]) -> dict[Peer, T]:
    """Measure one after the other; who cannot be measured is a line in `failures`."""
    found = {}
    for peer in peers:
        print(f"bench:   {peer.name}", file=sys.stderr)
        try:
            found[peer] = measure(peer)
        except SteerError as error:
            failures.append(_reason(peer, error))
    return found


def all_running(
    peers: Sequence[Peer], port: int, workers: int, stack: ExitStack, failures: list[str]
) -> dict[str, Running]:
    """Start them all, on `port` and those after it; who does not start is a line in `failures`.

    Args:
        stack: ends them.
    """
    found = {}
    for number, peer in enumerate(peers):
        print(f"bench:   {peer.name}", file=sys.stderr)
        try:
            started = running(peer, port + number, workers=workers)
            found[peer.name] = stack.enter_context(started)
        except SteerError as error:
            failures.append(_reason(peer, error))
    return found


def _reason(peer: Peer, error: SteerError) -> str:
    return f"{peer.name}: {error}\n{error.detail}".rstrip()


def _kill_all(mark: Mapping[str, str]) -> None:
    """Of workers, some are in a session of their own."""
    wanted = {f"{key}={value}".encode() for key, value in mark.items()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted <= set(path.read_bytes().split(b"\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)


# ---- who serves


def _children(running: Running) -> list[int]:
    """Those of the master's descendants that have the listener open."""
    listeners = _listeners(running.site.port)
    family = processes.descendants(running.server.pid)[1:]
    return [pid for pid in family if listeners.intersection(_files(pid))]


def _listeners(port: int) -> set[str]:
    """What /proc shows for a file that is a listener on the port (proc_pid_net(5))."""
    found = set()
    with open("/proc/net/tcp") as file:
        next(file)
        for line in file:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state != "0A":  # they come first, and what follows may be long
                break
            if int(local.partition(":")[2], 16) == port:
                found.add(f"socket:[{inode}]")
    return found


def _files(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def _steers(running: Running) -> list[int]:
    return [worker["pid"] for worker in status(running)["workers"] if worker["state"] == "ready"]


def status(running: Running) -> dict[str, Any]:
    """Of steer; without workers while nobody answers."""
    environment = running.site.environment
    with contextlib.suppress(NotRunning, ControlError):
        path = find.locate(servers.name(running.site.port), None, environment)
        service: dict[str, Any] = client.ask(path, "status")["service"]
        return service
    return {"workers": []}


# ---- how they reload and scale


def _hang_up(running: Running) -> None:
    old = running.workers()
    os.kill(running.server.pid, signal.SIGHUP)
    running.wait_for_workers(len(old), old)


def _one_by_one(running: Running, count: int) -> None:
    """TTIN is one more, TTOU one less. One at a time: signals do not queue."""
    while (now := len(running.workers())) != count:
        step = 1 if count > now else -1
        os.kill(running.server.pid, signal.SIGTTIN if step > 0 else signal.SIGTTOU)
        running.wait_for_workers(now + step)


def _reconfigure_nginx(running: Running, count: int) -> None:
    old = running.workers()
    _configure_nginx(running.site, count)
    os.kill(running.server.pid, signal.SIGHUP)
    running.wait_for_workers(count, old)


def steer(running: Running, *arguments: str) -> str:
    """What `steer COMMAND NAME [MORE]` prints. Raises SteerError: refused, or failed."""
    command, *more = arguments
    name = servers.name(running.site.port)
    done = subprocess.run(
        [tool("steer"), command, name, *more],
        env=running.site.environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SteerError(f"steer {command}", lines[0], detail="\n".join(lines[1:]))
    return done.stdout


# ---- the table


def _nginx(site: Site) -> list[str]:
    _configure_nginx(site, WORKERS)
    return [servers.system_tool("nginx"), "-c", str(site.directory / _NGINX)]


def _configure_nginx(site: Site, workers: int) -> None:
    text = _NGINX_CONF.format(workers=workers, directory=site.directory, host=HOST, port=site.port)
    (site.directory / _NGINX).write_text(text)


def _gunicorn(*options: str) -> Callable[[Site], list[str]]:
    return lambda site: [*servers.gunicorn(site.port, WORKERS), *options]


def plain(name: str, command: Callable[[Site], list[str]]) -> Peer:
    """One that is only to be asked."""
    return Peer(name, command, None, None, _children)


def under_steer(name: str, workers: int, *arguments: str) -> Peer:
    """The same, of `steer run ARGUMENTS`."""
    command = partial(_under_steer, workers, arguments)
    return Peer(name, command, None, None, _steers, is_steer=True)


def _under_steer(workers: int, arguments: Sequence[str], site: Site) -> list[str]:
    return servers.steer_run(site.port, workers, *arguments)


def carrying_uvicorn(app: str) -> tuple[str, ...]:
    """The end of a `steer run`."""
    return ("--", tool("uvicorn"), "--fd", "{fd}", *_UVICORN, app)


def served_by_uvicorn(app: str) -> tuple[str, ...]:
    """The end of a `steer run` that serves the app itself, as `carrying_uvicorn` does."""
    options = ("lifespan=off", "access_log=false", "log_level=warning", "loop=asyncio", "http=h11")
    named = (word for option in options for word in ("--server-option", option))
    return ("--server", "uvicorn", *named, app)


def uvicorn(workers: int, app: str) -> Callable[[Site], list[str]]:
    return lambda at: [
        *(tool("uvicorn"), "--port", str(at.port), "--workers", str(workers), *_UVICORN, app)
    ]


def steered(policy: str, app: str = "bench.apps:asgi") -> Peer:
    """uvicorn under steer."""
    return Peer(
        f"steer, {policy}",
        lambda at: servers.steer_run(at.port, WORKERS, "--policy", policy, *carrying_uvicorn(app)),
        lambda running: steer(running, "reload"),
        lambda running, count: steer(running, "scale", str(count)),
        _steers,
        is_steer=True,
    )


_UVICORN = (
    *("--lifespan", "off", "--no-access-log", "--log-level", "warning"),
    # Not what else is installed: figures are to be of the same thing everywhere.
    *("--loop", "asyncio", "--http", "h11"),
)
_ASGI = "bench.apps:asgi"
_MORE = str(WORKERS)

STEER = (steered("cpu"), steered("round-robin"))
PEERS = (
    Peer("gunicorn", _gunicorn(), _hang_up, _one_by_one, _children),
    Peer("gunicorn --reuse-port", _gunicorn("--reuse-port"), _hang_up, _one_by_one, _children),
    Peer(
        "uvicorn --workers",
        uvicorn(WORKERS, _ASGI),
        _hang_up,
        _one_by_one,
        _children,
    ),
    Peer(
        "granian",
        # It waits this long for each new worker before it ends an old one. 3.5 by default, which
        # only makes a reload take 14 s; a worker is up well within 1.
        lambda at: [
            *(tool("granian"), "--port", str(at.port), "--workers", _MORE, "--interface", "asgi"),
            *("--respawn-failed-workers", "--respawn-interval", "1", _ASGI),
        ],
        _hang_up,
        None,
        _children,
    ),
    Peer(
        "hypercorn",
        lambda at: [tool("hypercorn"), "-b", f"{HOST}:{at.port}", "-w", _MORE, _ASGI],
        None,  # it only has --reload, which watches files for developers
        None,
        _children,
    ),
    Peer("nginx, reuseport", _nginx, _hang_up, _reconfigure_nginx, _children),
)
ALL = (*STEER, *PEERS)
FEW = (STEER[0], PEERS[0])
"""To see that a bench runs."""
