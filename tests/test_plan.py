"""Plans for a service that runs already: what may change, and how far it can grow."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import asdict, replace

from steer import plan as planning
from steer.config import FIELDS, Service
from steer.cpus import Topology
from steer.errors import ConfigError
from steer.ladder import Answer, Finding
from steer.plan import FIXED, Plan, again, scaled

FOUR = Topology((0, 1, 2, 3), (0, 1, 2, 3), {})
TWO = Topology((0, 1), (0, 1, 2, 3), {})
YES = {"ebpf": Finding(Answer.YES), "cbpf": Finding(Answer.YES)}
OTHER: dict[str, Any] = {
    "app": "app:other",
    "command": ("sleep", "1"),
    "bind": ("127.0.0.1:8081",),
    "workers": 3,
    "policy": "hash",
    "backend": "cbpf",
    "strict": True,
    "weights": (2, 3),
    "name": "other",
    "user": "nobody",
    "group": "nogroup",
    "env": ("A=1",),
    "chdir": "/tmp",
    "backlog": 7,
    "graceful_timeout": 1.0,
    "ready_timeout": 1.0,
    "hang_timeout": 1.0,
    "hang": "skip",
    "watchdog": 1.0,
    "adopt_timeout": 1.0,
    "pid": "/tmp/pid",
    "log_level": "debug",
    "log_format": "json",
    "control_socket": "/tmp/sock",
}
"""For each key a value that is not the default."""


def running(**keys: Any) -> Plan:
    return planning.plan(Service(**keys), FOUR, YES)


def cpus(plan: Plan) -> list[int | None]:
    return [seat.cpu for seat in plan.seats]


def test_every_key_is_thought_of() -> None:
    assert list(OTHER) == list(FIELDS)
    assert set(FIXED) <= FIELDS.keys()


@pytest.mark.parametrize("key", FIXED)
def test_what_cannot_change_live_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reload demo: {key} is .* and would be ") as caught:
        again(running(), Service(**{key: OTHER[key]}), FOUR)
    assert caught.value.cure == f"stop and start it, or put {key} back"
    with pytest.raises(ConfigError, match=rf"^adopt demo: {key} is "):
        again(running(), Service(**{key: OTHER[key]}), FOUR, "adopt demo")


@pytest.mark.parametrize("key", FIELDS.keys() - set(FIXED))
def test_all_else_can_change(key: str) -> None:
    service = Service(**{key: OTHER[key]})
    assert again(running(), service, FOUR).service == service


def test_what_is_made_once_stays() -> None:
    before = running(workers=2, weights=(1, 1))
    after = again(before, Service(workers=40, weights=(1000, 1)), FOUR)
    kept = ("name", "binds", "policy", "rungs", "slots", "hash_length")
    assert [asdict(after)[key] for key in kept] == [asdict(before)[key] for key in kept]
    assert [seat.weight for seat in after.seats] == [1000] + 39 * [1]


def test_auto_follows_the_cpus_there_are_now() -> None:
    before = running()
    after = again(before, Service(), TWO)
    assert (cpus(before), cpus(after)) == ([0, 1, 2, 3], [0, 1])
    assert after.topology == TWO


def test_scaled_keeps_the_seats_that_stay() -> None:
    before = running(workers=4, weights=(1, 2, 3, 4))
    assert scaled(before, 2, FOUR).seats == before.seats[:2]
    assert scaled(before, 6, FOUR).seats[:4] == before.seats
    # Also of those who come back.
    assert scaled(scaled(before, 1, FOUR), 4, FOUR).seats == before.seats
    assert scaled(before, 2, FOUR).service.workers == 2


def test_scaled_to_none_is_configured_as_before() -> None:
    """Nobody can configure 0, nor read it back."""
    before = running(workers=4)
    after = scaled(before, 0, FOUR)
    assert (after.seats, after.service) == ((), before.service)


@pytest.mark.parametrize("started, room", [(1, 128), (60, 128), (65, 256), (200, 512)])
def test_each_worker_there_is_room_for_can_be_replaced(started: int, room: int) -> None:
    plan = running(workers=started)
    assert len(scaled(plan, room, FOUR).seats) == room
    assert 2 * room <= plan.slots
    words = f"run {room + 1} workers in demo: it was started with room for {room}, each of which"
    with pytest.raises(ConfigError, match=words):
        scaled(plan, room + 1, FOUR)
    with pytest.raises(ConfigError, match=words):
        again(plan, replace(plan.service, workers=room + 1), FOUR)


def test_as_many_as_can_be_configured_can_be_replaced() -> None:
    plan = running(workers=1024)
    assert len(again(plan, plan.service, FOUR).seats) == 1024
