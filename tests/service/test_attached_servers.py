"""Servers that others wrote, attached: how connections are spread, and their own reloads."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from steer.sockets import sock_diag
from testkit import foreign
from testkit.attached import HOST, Attach, asking, attaching, threads
from testkit.harness import CPUS, PORT
from testkit.processes import eventually, running, session
from testkit.service import Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

AT_LEAST = 200


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


def inodes() -> set[int]:
    return {each.inode for each in sock_diag.listeners(2, PORT)}


def selected(attached: Service) -> int:
    found: int = attached.status()["totals"]["selected"]
    return found


def reloaded(attached: Service, reload: Callable[[], object], listeners: int) -> None:
    """Have the server reload, while clients ask, until all its listeners are others."""
    before = inodes()
    begun = selected(attached)
    eventually(lambda: selected(attached) > begun + AT_LEAST)
    reload()
    eventually(lambda: len(inodes()) == listeners and not before & inodes())
    eventually(lambda: [each["state"] for each in attached.workers()] == ["ready"] * listeners)
    begun = selected(attached)
    eventually(lambda: selected(attached) > begun + AT_LEAST)


def has_ended(attached: Service) -> bool:
    return not session(attached.pid) and not attached.control_socket.exists()


@pytest.mark.needs("tracing")
def test_killed_attacher_loses_nothing_and_leaves_nothing(attach: Attach) -> None:
    with threads(4), asking() as clients:
        for _ in range(3):
            attached = attach("--policy", "round-robin")
            eventually(lambda each=attached: selected(each) > AT_LEAST)
            attached.send_signal(signal.SIGKILL)
            attached.wait()
            eventually(lambda each=attached: has_ended(each))
            attached.leaves_nothing()
    assert (clients.failed, clients.answered > 3 * AT_LEAST) == (0, True)


@pytest.mark.needs("nginx")
def test_workers_of_nginx_get_their_turns(attach: Attach, home: Path) -> None:
    with foreign.nginx(home, f"{HOST}:{PORT} reuseport"):
        eventually(lambda: len(inodes()) == 3)
        attached = attach("--policy", "round-robin")
        with asking():
            eventually(lambda: selected(attached) > 10 * AT_LEAST)
        counts = attached.selected().values()
        assert max(counts) - min(counts) <= len(CPUS)
        notes = attached.status()["notes"]
        assert any("waits for its successor" in each for each in notes)


@pytest.mark.needs("nginx")
def test_reload_of_nginx_with_fewer_workers_loses_nothing(attach: Attach, home: Path) -> None:
    with foreign.nginx(home, f"{HOST}:{PORT} reuseport") as master:
        eventually(lambda: len(inodes()) == 3)
        attached = attach()
        file = home / "nginx.conf"
        with asking() as clients:
            for workers in (1, 3, 1):
                text = foreign.NGINX.format(home=home, bind=f"{HOST}:{PORT} reuseport")
                file.write_text(text.replace("_processes 3", f"_processes {workers}"))
                os.kill(master, signal.SIGHUP)
                eventually(lambda count=workers: len(inodes()) == count)
                begun = selected(attached)
                eventually(lambda begun=begun: selected(attached) > begun + AT_LEAST)
        assert (clients.failed, clients.answered > 4 * AT_LEAST) == (0, True)


@pytest.mark.needs("nginx")
def test_status_shows_the_workers_of_nginx_after_reloads(attach: Attach, home: Path) -> None:
    with foreign.nginx(home, f"{HOST}:{PORT} reuseport") as master:
        eventually(lambda: len(inodes()) == 3)
        attached = attach()
        for _ in range(2):
            before = workers_of(master)
            os.kill(master, signal.SIGHUP)
            eventually(lambda old=before: not old & workers_of(master))
        eventually(lambda: {each["pid"] for each in attached.workers()} == workers_of(master))


def workers_of(master: int) -> set[int]:
    text = Path(f"/proc/{master}/task/{master}/children").read_text()
    return {int(each) for each in text.split()}


@pytest.mark.needs("gunicorn")
def test_reload_of_gunicorn_loses_nothing(attach: Attach, home: Path) -> None:
    with foreign.gunicorn(home, "--reuse-port") as arbiter:
        eventually(lambda: len(inodes()) == 2)
        attached = attach()
        with asking() as clients:
            for _ in range(2):
                reloaded(attached, lambda: os.kill(arbiter, signal.SIGHUP), 2)
        assert clients.failed == 0


@pytest.mark.needs("haproxy")
def test_haproxy_that_takes_the_place_of_others_loses_nothing(attach: Attach, home: Path) -> None:
    with ExitStack() as stack, foreign.haproxy(home, 2, bind=f"{HOST}:{PORT}") as old:
        eventually(lambda: len(inodes()) == 2)
        attached = attach()
        options = ("-f", str(home / "haproxy.cfg"), "-sf", *map(str, old))
        with asking() as clients:
            reloaded(attached, lambda: stack.enter_context(running("haproxy", "-db", *options)), 1)
        assert clients.failed == 0
