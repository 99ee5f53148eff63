"""Plans for a service that runs already: what may change, and how far it can grow."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import asdict, replace

from steer import plan as planning
from steer import policies
from steer.config import FIELDS, Service
from steer.cpus import Topology
from steer.declared import Declared
from steer.errors import ConfigError
from steer.ladder import Answer, Finding, Rung
from steer.plan import FIXED, Plan, again, choosing_by, scaled
from steer.policy import POLICIES, own

FOUR = Topology((0, 1, 2, 3), (0, 1, 2, 3), {})
TWO = Topology((0, 1), (0, 1, 2, 3), {})
YES = {"ebpf": Finding(Answer.YES), "cbpf": Finding(Answer.YES)}
OTHER: dict[str, Any] = {
    "app": "app:other",
    "command": ("sleep", "1"),
    "bind": ("127.0.0.1:8081",),
    "workers": 3,
    "policy": "hash",
    "params": ("prefix4=24",),
    "backend": "cbpf",
    "strict": True,
    "weights": (2, 3),
    "name": "other",
    "user": "nobody",
    "group": "nogroup",
    "keep_privileges": True,
    "env": ("A=1",),
    "chdir": "/tmp",
    "backlog": 7,
    "socket_options": ("mark=7",),
    "graceful_timeout": 1.0,
    "stop_signal": "QUIT",
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
    policy = policies.find("source") if key == "params" else None
    assert again(running(), service, FOUR, policy=policy).service == service


def test_what_is_made_once_stays() -> None:
    before = running(workers=2, weights=(1, 1))
    after = again(before, Service(workers=40, weights=(100, 1)), FOUR)
    kept = ("name", "binds", "policy", "params", "rungs", "slots")
    assert [asdict(after)[key] for key in kept] == [asdict(before)[key] for key in kept]
    assert [seat.weight for seat in after.seats] == [100] + 39 * [1]


@pytest.mark.parametrize("weights, length", [((1, 1), 4096), ((100, 1), 5050), ((1000, 1), 50050)])
def test_the_hash_table_is_long_enough_for_weights_of_a_reload(
    weights: tuple[int, ...], length: int
) -> None:
    """And gets no shorter again: where it stays as it is, only the flows that have to move do."""
    heavier = again(running(workers=2), Service(workers=2, weights=weights), FOUR)
    assert heavier.hash_length == length
    assert again(heavier, Service(workers=2), FOUR).hash_length == length


def test_the_hash_table_is_long_enough_for_workers_of_a_reload() -> None:
    after = again(running(workers=2), Service(workers=60, weights=(100, 1)), FOUR)
    assert after.hash_length == 50 * (100 + 59)


# Another policy


def on(there: str, policy: str, **keys: Any) -> Plan:
    """A service that runs there."""
    plan = planning.plan(Service(policy=policy, **keys), FOUR, {}, policies.find(policy))
    return replace(plan, rungs=(Rung(there, "so it is", False),))


def swapped(before: Plan, policy: str, **keys: Any) -> Plan:
    service = replace(before.service, policy=policy, **{"params": (), **keys})
    return choosing_by(before, service, policies.find(policy), FOUR, "change it")


BUILT_IN = list(POLICIES)


@pytest.mark.parametrize("after", BUILT_IN)
@pytest.mark.parametrize("before", BUILT_IN)
def test_any_policy_can_become_any_other(before: str, after: str) -> None:
    """Of the plan nothing changes but what the policy is about."""
    first = on("kernel" if before == "kernel" else "ebpf", before, workers=3)
    then = swapped(first, after)
    assert then.policy == policies.find(after)
    assert then.service == replace(first.service, policy=after)
    assert then.params == tuple(param.default for param in then.policy.declared.params)
    assert cpus(then) == ([0, 1, 2] if after == "cpu" else [None] * 3)
    assert [seat.cpus for seat in then.seats if after != "cpu"] in ([], [FOUR.allowed] * 3)
    kept = ("name", "binds", "slots", "hash_length", "topology")
    assert [asdict(then)[key] for key in kept] == [asdict(first)[key] for key in kept]


@pytest.mark.parametrize("backend", ["ebpf", "cbpf", "kernel"])
def test_the_backend_there_is_stays_and_so_does_its_reason(backend: str) -> None:
    assert swapped(on(backend, "hash"), "source").rungs == (Rung(backend, "so it is", False),)


@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_the_kernels_own_hash_needs_no_program(backend: str) -> None:
    assert swapped(on(backend, "hash"), "kernel").rungs == (Rung("kernel", None, False),)


@pytest.mark.parametrize(
    "asked, policy, backends",
    [
        ("auto", "hash", ["ebpf"]),
        ("ebpf", "least-conn", ["ebpf"]),
        ("kernel", "hash", ["kernel"]),
        ("kernel", "flow", ["kernel"]),
    ],
)
def test_after_the_kernels_own_hash_it_is_as_at_a_start(
    asked: Any, policy: str, backends: list[str]
) -> None:
    """But with no fallback: that would be another order of sockets than we know, or no program."""
    plan = swapped(on("kernel", "kernel", backend=asked), policy)
    assert [rung.backend for rung in plan.rungs] == backends


NOT_ON_CBPF = {
    "round-robin": "classic BPF keeps no state, so it cannot take turns",
    "least-conn": "classic BPF cannot read what is counted",
    "flow": "classic BPF remembers nothing",
}


@pytest.mark.parametrize("policy", NOT_ON_CBPF)
def test_what_classic_bpf_cannot_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        swapped(on("cbpf", "hash"), policy)
    assert str(caught.value) == (
        f"change it: {policy} cannot be on cbpf: {NOT_ON_CBPF[policy]}; "
        "allowed: cpu, hash, source, random, kernel"
    )


@pytest.mark.parametrize("policy", ["hash", "flow"])
def test_what_was_asked_for_is_kept_to(policy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        swapped(on("kernel", "kernel", backend="cbpf"), policy)
    assert str(caught.value) == (
        f"change it: {policy} cannot follow the kernel's own hash on cbpf; stop and start it"
    )


def test_one_of_ones_own_cannot_be_on_classic_bpf() -> None:
    mine = own("mine", "/srv/mine.c", Declared(), "")
    service = Service(policy="/srv/mine.c")
    with pytest.raises(
        ConfigError, match=r"^change it: mine cannot be on cbpf: classic BPF cannot"
    ):
        choosing_by(on("cbpf", "hash"), service, mine, FOUR, "change it")
    with pytest.raises(ConfigError, match=r"^reload demo: mine cannot be on cbpf: "):
        again(on("cbpf", "hash"), service, FOUR, policy=mine)
    assert choosing_by(on("ebpf", "hash"), service, mine, FOUR, "").policy is mine


def test_params_are_checked_and_stand_in_the_order_of_their_declaration() -> None:
    first = on("ebpf", "source", params=("prefix6=48",))
    assert first.params == (32, 48)
    assert swapped(first, "source", params=("prefix6=56", "prefix4=24")).params == (24, 56)
    assert swapped(first, "source").params == (32, 64)
    assert again(first, replace(first.service, params=("prefix4=8",)), FOUR).params == (8, 64)
    assert first.describe()["params"] == {"prefix4": 32, "prefix6": 48}


@pytest.mark.parametrize(
    "policy, params, said",
    [
        (
            "source",
            ("prefix4=33",),
            "parameter prefix4 = '33'; allowed: whole numbers from 0 to 32",
        ),
        ("source", ("idle=3",), "no parameter 'idle' (of 'idle=3'); allowed: prefix4, prefix6"),
        ("flow", ("idle=1", "idle=2"), "parameter idle is given twice; give it once"),
        ("hash", ("a=1",), "no parameter 'a' (of 'a=1'); this policy has none"),
    ],
)
def test_params_that_cannot_be(policy: str, params: tuple[str, ...], said: str) -> None:
    first = on("ebpf", "hash")
    service = replace(first.service, policy=policy, params=params)
    chosen = policies.find(policy)
    with pytest.raises(ConfigError) as caught:
        choosing_by(first, service, chosen, FOUR, "change it")
    assert str(caught.value) == f"change it: {said}"
    with pytest.raises(ConfigError) as caught:
        again(first, service, FOUR, policy=chosen)
    assert str(caught.value) == f"reload demo: {said}"
    with pytest.raises(ConfigError) as caught:
        planning.plan(service, FOUR, YES, chosen)
    assert str(caught.value) == f"--policy {policy}: {said}"


def test_weights_may_change_live() -> None:
    first = on("ebpf", "hash", workers=3, weights=(1, 2))
    then = swapped(first, "least-conn", weights=(5, 1, 4))
    assert [seat.weight for seat in then.seats] == [5, 1, 4]
    assert swapped(then, "hash", weights=(1000,)).hash_length == 50 * 1002


def test_a_swap_starts_no_workers() -> None:
    """Scaled away or not there yet, they stay so; with none a policy may change all the same."""
    first = scaled(on("ebpf", "hash", workers=4), 0, FOUR)
    then = swapped(first, "least-conn", weights=(3,))
    assert (then.seats, then.service.workers) == ((), 4)
    assert [seat.weight for seat in scaled(then, 2, FOUR).seats] == [3, 1]


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
