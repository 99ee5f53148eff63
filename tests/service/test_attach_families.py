"""`steer attach` to a wildcard that a server listens at in both families, nginx for example."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testkit.attached import HOST, Attach, attaching
from testkit.fixtures import RunSteer
from testkit.harness import PORT
from testkit.processes import eventually
from testkit.service import Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield start


@contextmanager
def listener_of_both_families() -> Iterator[None]:
    with (
        socket.create_server(("", PORT), reuse_port=True),
        socket.create_server(("::", PORT), family=socket.AF_INET6, reuse_port=True),
    ):
        yield


def test_both_families_of_a_wildcard_are_one_service(attach: Attach, steer: RunSteer) -> None:
    name = f"{Path('/proc/self/comm').read_text().strip()}-{PORT}"
    with listener_of_both_families():
        attached = attach(where=f":{PORT}", name=name, names_itself=True)
        assert f"2 listeners of :{PORT} and [::]:{PORT}, " in attached.log
        connect_to_both()
        assert selected(attached) == {0: 1, 1: 1}
        assert [each["address"] for each in attached.status()["binds"]] == ["0.0.0.0", "::"]
        assert attached.steer("policy", "least-conn").returncode == 0
        connect_to_both()
        assert attached.status()["totals"]["selected"] == 4
        assert "no other is ready" in attached.steer("drain", "1").stderr
        done = steer("detach", f"[::]:{PORT}")
        assert done.returncode == 0, done.stderr
    attached.leaves_nothing()


def test_one_family_of_a_wildcard_is_attached_by_its_address(attach: Attach) -> None:
    with listener_of_both_families():
        first = attach(where=f"0.0.0.0:{PORT}")
        second = attach(where=f"[::]:{PORT}", name="other")
        assert [len(each.workers()) for each in (first, second)] == [1, 1]


def test_family_that_cannot_be_steered_can_be_left_out(attach: Attach, steer: RunSteer) -> None:
    with (
        socket.create_server(("", PORT), reuse_port=True),
        socket.create_server(("::", PORT), family=socket.AF_INET6),
    ):
        said = steer("attach", f":{PORT}").stderr
        assert f"attach to :{PORT}: attach to [::]:{PORT}: it is one socket without" in said
        assert f"`steer attach 0.0.0.0:{PORT}` leaves it out" in said
        attach(where=f"0.0.0.0:{PORT}")


def test_both_are_steered_on_after_the_attacher_has_re_executed(attach: Attach) -> None:
    with listener_of_both_families():
        attached = attach(where=f":{PORT}")
        connect_to_both()
        attached.send_signal(signal.SIGUSR2)
        eventually(lambda: attached.log.count("attached in"), 2)
        attached.wait_asked()
        connect_to_both()
        assert selected(attached) == {0: 2, 1: 2}
        assert attached.stop() == 0
    attached.leaves_nothing()


@pytest.mark.needs("tracing")
def test_guard_gives_both_back(attach: Attach) -> None:
    with listener_of_both_families():
        attached = attach(where=f":{PORT}")
        os.kill(attached.pid, signal.SIGKILL)
        attached.wait()
        eventually(lambda: not attached.control_socket.exists())
        for label in (f"tcp 0.0.0.0:{PORT}", f"tcp [::]:{PORT}"):
            assert f"detached from {label}: the kernel's hash selects" in attached.log
        attached.leaves_nothing()


def connect_to_both() -> None:
    for host in (HOST, "::1"):
        socket.create_connection((host, PORT)).close()


def selected(attached: Service) -> dict[int, int]:
    """By slot."""
    return {each["slot"]: each["connections"]["selected"] for each in attached.workers()}
