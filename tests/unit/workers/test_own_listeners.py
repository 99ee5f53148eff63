"""When a server that opens its listeners itself is ready."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from steer.config.service import Service
from steer.errors import KernelError
from steer.linux.waiting import Seen
from steer.workers import own_listeners

ONE, TWO = ("127.0.0.1:80",), ("127.0.0.1:80", "[::1]:80")


@pytest.mark.parametrize(
    "binds, keys, age_s, found, seen",
    [
        (ONE, {}, 0, [{1}], Seen.YES),
        (ONE, {}, 0, [set()], Seen.NO),
        (ONE, {"workers": 2}, 0, [{1}], Seen.NO),
        (ONE, {"workers": 2}, 0, [{1, 2}], Seen.YES),
        (ONE, {"workers": 2, "instances": 2}, 0, [{1}], Seen.YES),
        (ONE, {"workers": 2}, 20, [{1}], Seen.YES),
        (ONE, {"workers": 2}, 20, [set()], Seen.NO),
        (TWO, {}, 0, [{1}, set()], Seen.NO),
        (TWO, {}, 20, [{1}, set()], Seen.NO),
        (TWO, {"workers": 2}, 0, [{1, 2}, {3}], Seen.NO),
        (TWO, {"workers": 2}, 0, [{1, 2}, {3, 4}], Seen.YES),
    ],
)
def test_server_is_ready_with_as_many_listeners_as_asked_for_or_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
    binds: tuple[str, ...],
    keys: dict[str, Any],
    age_s: float,
    found: list[set[int]],
    seen: Seen,
) -> None:
    service = Service(socket="adopt", command=("x",), bind=binds, ready_timeout=30.0, **keys)
    there = dict(zip(service.binds, map(frozenset[int], found), strict=True))
    monkeypatch.setattr(own_listeners, "at_each", lambda _: there)
    asked: list[frozenset[int]] = []
    monkeypatch.setattr(
        own_listeners, "waits_on", lambda _pid, inodes: (asked.append(inodes), Seen.YES)[1]
    )
    assert own_listeners.waits(process(service, age_s)) is seen
    assert asked == ([frozenset[int]().union(*found)] if seen is Seen.YES else [])


def process(service: Service, age_s: float) -> Any:
    launch = SimpleNamespace(service=service)
    return SimpleNamespace(pid=7, launch=launch, started_s=time.monotonic() - age_s)


def test_what_cannot_be_seen_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_process: object) -> None:
        raise KernelError("list listeners", "EPERM", "run as root")

    monkeypatch.setattr(own_listeners, "at_each", refuse)
    one = process(Service(socket="adopt", command=("x",)), 0)
    assert own_listeners.waits(one) is Seen.UNKNOWN
    assert own_listeners.not_ready(one) == ("list listeners: EPERM", "run as root")
