"""A running service, asked and changed from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import steer
from steer.api import connection
from testkit.fixtures import StartService


@pytest.fixture(autouse=True)
def directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where services of the test are looked for."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    monkeypatch.setenv("STEER_RUNTIME_DIR", str(home / "run" / "steer"))


def test_service_is_asked_and_changed(service: StartService) -> None:
    running = service("-w", "2", "--policy", "hash")
    with steer.connect("test") as connected:
        assert isinstance(connected, steer.ServiceConnection)
        assert connected.name == "test"
        told = connected.status()
        assert (told.pid, told.policy, len(told.workers)) == (running.pid, "hash", 2)
        assert connected.scale(3).workers == 3
        swapped = connected.set_policy("source", {"prefix4": 24}, weights=[3, 1, 1])
        assert swapped.policy == "source"
        told = connected.status()
        assert told.params["prefix4"] == 24
        assert [each.weight for each in told.workers] == [3, 1, 1]
        assert connected.drain(0).slot == 0
        assert connected.status().workers[0].state == "draining"
        assert connected.undrain(0).slot == 0
        assert connected.restart(1).slot == 1
        assert connected.reload().generation == 2
        connected.stop()
        with pytest.raises(steer.NotRunning):
            connected.status()


def test_one_that_runs_alone_needs_no_name(service: StartService) -> None:
    running = service("-w", "1")
    with steer.connect() as connected:
        assert connected.status().pid == running.pid
    path = str(connected.control_socket)
    with steer.connect(control_socket=path) as connected:
        assert connected.status().name == "test"


def test_what_cannot_be_is_refused_and_changes_nothing(service: StartService) -> None:
    service("-w", "2", "--policy", "hash")
    with steer.connect() as connected:
        with pytest.raises(steer.Refused, match="slot"):
            connected.drain(99)
        with pytest.raises(steer.Refused, match="no-such-policy"):
            connected.set_policy("no-such-policy")
        with pytest.raises(steer.Refused):
            connected.scale(0)
        told = connected.status()
        assert (told.policy, len(told.workers)) == ("hash", 2)


WRONG: dict[str, Callable[[steer.ServiceConnection, Any], object]] = {
    "workers": lambda service, value: service.scale(value),
    "slot": lambda service, value: (service.drain(value), service.undrain(value)),
    "policy": lambda service, value: service.set_policy(value),
    "params": lambda service, value: service.set_policy("hash", value),
    "weights": lambda service, value: service.set_policy("hash", weights=value),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_another_type_are_named(name: str, tmp_path: Path) -> None:
    with steer.ServiceConnection(tmp_path / "web.sock") as connected:
        for value in (object(), 3.5, [("a", 1)], {"a": "b"}, b"hash", True):
            with pytest.raises(steer.ConfigError, match=rf"web: {name}.* = .*; allowed: "):
                WRONG[name](connected, value)


def test_none_runs() -> None:
    with pytest.raises(steer.NotRunning, match="start one with `steer run`"):
        steer.connect()


def test_one_connection_is_kept_for_asking(service: StartService) -> None:
    service("-w", "1")
    with steer.connect() as connected:
        connected.status()
        (first,) = connected._connections._open.values()
        connected.status()
        assert list(connected._connections._open.values()) == [first]
    assert first.fileno() == -1


def test_path_of_a_policy_is_from_where_we_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def perform(path: Path, command: str, **more: object) -> object:
        asked.append(more["policy"])
        return connection.outcomes.Swapped("mine", "ebpf", 0.0)

    monkeypatch.setattr(connection.client, "perform", perform)
    monkeypatch.chdir(tmp_path)
    connection.ServiceConnection(tmp_path / "web.sock").set_policy("./mine.c")
    assert asked == [str(tmp_path / "mine.c")]
