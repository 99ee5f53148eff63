"""Plans for a service that runs already: what may change, and how far it can grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from msgspec.structs import asdict, replace

from steer.config import plan_change, planning
from steer.config.candidates import BackendCandidate, PolicyCandidate
from steer.config.fallback import first_that_works
from steer.config.plan import Plan
from steer.config.plan_change import FIXED, reloaded, scaled, with_candidates
from steer.config.service import FIELDS, Service
from steer.errors import ConfigError, KernelError
from steer.features import Answer, Finding
from steer.loader import find
from steer.policy.builtin import POLICIES, Policy, custom
from steer.policy.cpus import Topology
from steer.policy.declarations import Declared

FOUR = Topology((0, 1, 2, 3), (0, 1, 2, 3), {})
TWO = Topology((0, 1), (0, 1, 2, 3), {})
YES = {"ebpf": Finding(Answer.YES), "cbpf": Finding(Answer.YES)}
OTHER: dict[str, Any] = {
    "app": "app:other",
    "server": "uvicorn",
    "server_options": ("log_level=error",),
    "command": ("sleep", "1"),
    "demo": True,
    "preload": True,
    "bind": ("127.0.0.1:8081",),
    "workers": 3,
    "spares": 2,
    "socket": "adopt",
    "instances": 2,
    "reload_signal": "HUP",
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
    "max_memory": "1G",
    "max_lifetime": "1h",
    "reload_on_change": True,
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
    return [spec.cpu for spec in plan.specs]


def test_every_key_is_thought_of() -> None:
    assert list(OTHER) == list(FIELDS)
    assert set(FIXED) <= FIELDS.keys()


@pytest.mark.parametrize("key", FIXED)
def test_what_cannot_change_live_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reload demo: {key} is .* and would be ") as caught:
        reloaded(running(), Service(**{key: OTHER[key]}), FOUR)
    assert caught.value.cure == f"stop and start it, or put {key} back"
    with pytest.raises(ConfigError, match=rf"^adopt demo: {key} is "):
        reloaded(running(), Service(**{key: OTHER[key]}), FOUR, "adopt demo")


@pytest.mark.parametrize("key", FIELDS.keys() - set(FIXED))
def test_all_else_can_change(key: str) -> None:
    service = Service(**{key: OTHER[key]})
    chosen = candidates(service, "source") if key == "params" else ()
    assert reloaded(running(), service, FOUR, "", chosen).service == service


def test_what_is_made_once_stays() -> None:
    before = running(workers=2, weights=(1, 1))
    after = reloaded(before, Service(workers=40, weights=(100, 1)), FOUR)
    kept = ("name", "binds", "policy", "params", "backends", "slots")
    assert [asdict(after)[key] for key in kept] == [asdict(before)[key] for key in kept]
    assert [spec.weight for spec in after.specs] == [100] + 39 * [1]


@pytest.mark.parametrize("weights, length", [((1, 1), 4096), ((100, 1), 5050), ((1000, 1), 50050)])
def test_the_hash_table_is_long_enough_for_weights_of_a_reload(
    weights: tuple[int, ...], length: int
) -> None:
    """And gets no shorter again: where it stays as it is, only the flows that have to move do."""
    heavier = reloaded(running(workers=2), Service(workers=2, weights=weights), FOUR)
    assert heavier.hash_length == length
    assert reloaded(heavier, Service(workers=2), FOUR).hash_length == length


def test_the_hash_table_is_long_enough_for_workers_of_a_reload() -> None:
    after = reloaded(running(workers=2), Service(workers=60, weights=(100, 1)), FOUR)
    assert after.hash_length == 50 * (100 + 59)


# Another policy


def on(there: str, policy: str, **keys: Any) -> Plan:
    """A service that runs there."""
    plan = planning.plan(Service(policy=policy, **keys), FOUR, {}, find.find(policy))
    return replace(plan, backends=(BackendCandidate(there, "so it is", False),))


NO = Finding(Answer.NO, "EPERM")
UP_TO: dict[str, Mapping[str, Finding]] = {
    "ebpf": YES,
    "cbpf": {**YES, "ebpf": NO},
    "kernel": {"ebpf": NO, "cbpf": NO},
}
"""By the best backend, what the probes find."""


def candidates(
    service: Service, policy: Policy | str, best: str = "ebpf"
) -> Sequence[PolicyCandidate]:
    found = find.find(policy) if isinstance(policy, str) else policy
    return planning.policy_candidates(found, service, UP_TO[best], "change it")


def swapped(before: Plan, policy: str, best: str = "ebpf", **keys: Any) -> Plan:
    """Args: best: the backend that the probes find to work."""
    service = replace(before.service, policy=policy, **{"params": (), **keys})
    return with_candidates(before, service, candidates(service, policy, best), FOUR, "change it")


BUILT_IN = list(POLICIES)


@pytest.mark.parametrize("after", BUILT_IN)
@pytest.mark.parametrize("before", BUILT_IN)
def test_any_policy_can_become_any_other(before: str, after: str) -> None:
    """Of the plan nothing changes but what the policy is about."""
    first = on("kernel" if before == "kernel" else "ebpf", before, workers=3)
    then = swapped(first, after)
    assert then.policy == find.find(after)
    assert then.service == replace(first.service, policy=after)
    assert then.params == tuple(param.default for param in then.policy.declared.params)
    assert cpus(then) == ([0, 1, 2] if after == "cpu" else [None] * 3)
    assert [spec.cpus for spec in then.specs if after != "cpu"] in ([], [FOUR.allowed] * 3)
    kept = ("name", "binds", "slots", "hash_length", "topology")
    assert [asdict(then)[key] for key in kept] == [asdict(first)[key] for key in kept]


def backends(plan: Plan) -> list[list[str]]:
    """Those to try, for each policy to try."""
    return [[candidate.backend for candidate in each.backends] for each in plan.candidates]


@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_the_kernels_own_hash_needs_no_program(backend: str) -> None:
    assert swapped(on(backend, "hash"), "kernel").backends == (
        BackendCandidate("kernel", None, False),
    )


@pytest.mark.parametrize(
    "there, policy, best, tried",
    [
        ("cbpf", "hash", "ebpf", ["ebpf", "cbpf"]),
        ("cbpf", "hash", "cbpf", ["cbpf"]),
        ("kernel", "hash", "cbpf", ["cbpf"]),
        ("kernel", "least-conn", "ebpf", ["ebpf"]),
        ("ebpf", "hash", "ebpf", ["ebpf", "cbpf"]),
    ],
)
def test_every_backend_on_which_it_would_steer_is_tried(
    there: str, policy: str, best: str, tried: list[str]
) -> None:
    """Whichever there is: up as well as down."""
    assert backends(swapped(on(there, "source"), policy, best)) == [tried]


@pytest.mark.parametrize(
    "there, policy, best, asked, said",
    [
        (
            "cbpf",
            "least-conn",
            "cbpf",
            "auto",
            "least-conn would steer nothing: ebpf: EPERM; cbpf: classic BPF cannot read the "
            "counts of connections; allowed: cpu, hash, source, random, kernel",
        ),
        (
            "cbpf",
            "flow",
            "ebpf",
            "cbpf",
            "flow would steer nothing: backend = cbpf; cbpf: classic BPF keeps no state, so it "
            "cannot remember flows; allowed: cpu, hash, source, random, kernel",
        ),
        (
            "kernel",
            "hash",
            "kernel",
            "auto",
            "hash would steer nothing: ebpf: EPERM; cbpf: EPERM; see `steer doctor`",
        ),
        (
            "kernel",
            "hash",
            "ebpf",
            "kernel",
            "hash would steer nothing: backend = kernel; see `steer doctor`",
        ),
    ],
)
def test_what_would_steer_nothing_is_refused(
    there: str, policy: str, best: str, asked: Any, said: str
) -> None:
    before = on(there, "source", backend=asked)
    with pytest.raises(ConfigError) as caught:
        swapped(before, policy, best)
    assert str(caught.value) == f"change it: {said}"


def after_reload(before: Plan, policy: str, best: str, **keys: Any) -> Plan:
    service = replace(before.service, policy=policy, **keys)
    return reloaded(before, service, FOUR, "", candidates(service, policy, best))


def test_a_reload_leaves_the_kernels_own_hash_where_nothing_better_is_to_be_had() -> None:
    """What fell so low goes on, what was asked to be there may be, but nothing is put there."""
    fallen = on("kernel", "least-conn")
    assert backends(after_reload(fallen, "least-conn", "cbpf", workers=2)) == [["kernel"]]
    assert backends(after_reload(fallen, "hash", "cbpf")) == [["cbpf"]]
    with pytest.raises(ConfigError, match=r"^reload demo: round-robin would steer nothing: "):
        after_reload(fallen, "round-robin", "cbpf")
    as_asked = on("kernel", "hash", backend="kernel")
    assert backends(after_reload(as_asked, "source", "ebpf")) == [["kernel"]]


@pytest.mark.parametrize(
    "was, there, tried, tried_at_last",
    [
        ("cbpf", "kernel", ["cbpf"], ["cbpf", "kernel"]),
        ("ebpf", "kernel", ["ebpf"], ["ebpf", "kernel"]),
        ("ebpf", "cbpf", ["ebpf"], ["ebpf", "cbpf"]),
        ("cbpf", "cbpf", ["cbpf"], ["cbpf"]),
        ("cbpf", "ebpf", ["ebpf", "cbpf"], ["ebpf", "cbpf"]),
        ("kernel", "cbpf", ["cbpf", "kernel"], ["cbpf", "kernel"]),
    ],
)
def test_who_goes_back_tries_nothing_lower_at_first(
    was: str, there: str, tried: Sequence[str], tried_at_last: Sequence[str]
) -> None:
    before, now = on(was, "source"), on(there, "kernel" if there == "kernel" else "random")
    assert backends(plan_change.back_to(before, now, FOUR)) == [tried]
    at_last = plan_change.back_to(before, now, FOUR, may_be_worse=True)
    assert (at_last.policy.name, backends(at_last)) == ("source", [tried_at_last])


def test_one_of_ones_own_cannot_be_on_classic_bpf() -> None:
    mine = custom("mine", "/srv/mine.c", Declared(), "")
    service = Service(policy="/srv/mine.c")
    why_not = r"mine would steer nothing: ebpf: EPERM; cbpf: classic BPF cannot"
    chosen = candidates(service, mine, "cbpf")
    with pytest.raises(ConfigError, match=f"^change it: {why_not}"):
        with_candidates(on("cbpf", "hash"), service, chosen, FOUR, "change it")
    with pytest.raises(ConfigError, match=f"^reload demo: {why_not}"):
        reloaded(on("cbpf", "hash"), service, FOUR, "", chosen)
    chosen = candidates(service, mine)
    assert with_candidates(on("ebpf", "hash"), service, chosen, FOUR, "").policy is mine


def opened(*works: tuple[str, str]) -> Callable[[Plan], str]:
    """An attempt that works for these policies and backends only."""

    def attempt(plan: Plan) -> str:
        at = plan.policy.name, plan.backends[0].backend
        if at not in works:
            raise KernelError(f"try {at[1]}", "EPERM", detail="lines")
        return at[1]

    return attempt


def test_where_load_cannot_be_counted_after_all_auto_is_hash_on_the_best_backend() -> None:
    first = planning.plan(Service(), FOUR, YES)
    told: list[str] = []
    got, stands = first_that_works(first, opened(("hash", "ebpf")), told.append)
    assert (got, stands.policy.name, backends(stands)) == ("ebpf", "hash", [["ebpf"]])
    assert stands.policy_reason == "least-conn: try ebpf: EPERM"
    assert (stands.backends[0].reason, stands.backends[0].fallback, told) == (None, False, [])
    got, stands = first_that_works(first, opened(("hash", "cbpf")), told.append)
    assert (got, stands.backends[0].reason) == ("cbpf", "ebpf: try ebpf: EPERM")
    assert (stands.backends[0].fallback, told) == (True, ["try ebpf: EPERM\nlines"])


def test_where_nothing_works_all_that_failed_is_said() -> None:
    chosen = swapped(on("kernel", "least-conn"), "hash")
    with pytest.raises(KernelError) as caught:
        first_that_works(chosen, opened(), str)
    assert str(caught.value) == "steer by hash: ebpf: try ebpf: EPERM; cbpf: try cbpf: EPERM"
    with pytest.raises(KernelError) as caught:
        first_that_works(swapped(on("kernel", "hash"), "flow"), opened(), str)
    assert (str(caught.value), caught.value.detail) == ("try ebpf: EPERM", "lines")


def test_params_are_checked_and_stand_in_the_order_of_their_declaration() -> None:
    first = on("ebpf", "source", params=("prefix6=48",))
    assert first.params == (32, 48)
    assert swapped(first, "source", params=("prefix6=56", "prefix4=24")).params == (24, 56)
    assert swapped(first, "source").params == (32, 64)
    assert reloaded(first, replace(first.service, params=("prefix4=8",)), FOUR).params == (8, 64)
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
        (
            "auto",
            ("a=1",),
            "parameters are of one policy, and auto may become another; "
            "name the policy, see `steer policies`",
        ),
    ],
)
def test_params_that_cannot_be(policy: str, params: tuple[str, ...], said: str) -> None:
    first = on("ebpf", "hash")
    service = replace(first.service, policy=policy, params=params)
    with pytest.raises(ConfigError) as caught:
        candidates(service, policy)
    assert str(caught.value) == f"change it: {said}"
    with pytest.raises(ConfigError) as caught:
        planning.plan(service, FOUR, YES, find.find(policy))
    assert str(caught.value) == f"policy {policy}: {said}"


def test_weights_may_change_live() -> None:
    first = on("ebpf", "hash", workers=3, weights=(1, 2))
    then = swapped(first, "least-conn", weights=(5, 1, 4))
    assert [spec.weight for spec in then.specs] == [5, 1, 4]
    assert swapped(then, "hash", weights=(1000,)).hash_length == 50 * 1002


def test_a_swap_starts_no_workers() -> None:
    """Scaled away or not there yet, they stay so; with none a policy may change all the same."""
    first = scaled(on("ebpf", "hash", workers=4), 0, FOUR)
    then = swapped(first, "least-conn", weights=(3,))
    assert (then.specs, then.service.workers) == ((), 4)
    assert [spec.weight for spec in scaled(then, 2, FOUR).specs] == [3, 1]


def test_auto_follows_the_cpus_there_are_now() -> None:
    before = running(policy="cpu")
    after = reloaded(before, Service(policy="cpu"), TWO)
    assert (cpus(before), cpus(after)) == ([0, 1, 2, 3], [0, 1])
    assert after.topology == TWO


def test_scaled_keeps_the_specs_that_stay() -> None:
    before = running(workers=4, weights=(1, 2, 3, 4))
    assert scaled(before, 2, FOUR).specs == before.specs[:2]
    assert scaled(before, 6, FOUR).specs[:4] == before.specs
    # Also of those who come back.
    assert scaled(scaled(before, 1, FOUR), 4, FOUR).specs == before.specs
    assert scaled(before, 2, FOUR).service.workers == 2


def test_scaled_to_none_is_configured_as_before() -> None:
    """Nobody can configure 0, nor read it back."""
    before = running(workers=4)
    after = scaled(before, 0, FOUR)
    assert (after.specs, after.service) == ((), before.service)


@pytest.mark.parametrize("started, room", [(1, 128), (60, 128), (65, 256), (200, 512)])
def test_each_worker_there_is_room_for_can_be_replaced(started: int, room: int) -> None:
    plan = running(workers=started)
    assert len(scaled(plan, room, FOUR).specs) == room
    assert 2 * room <= plan.slots
    words = f"run {room + 1} workers in demo: it was started with capacity for {room}; stop it, and"
    with pytest.raises(ConfigError, match=words):
        scaled(plan, room + 1, FOUR)
    with pytest.raises(ConfigError, match=words):
        reloaded(plan, replace(plan.service, workers=room + 1), FOUR)


def test_as_many_as_can_be_configured_can_be_replaced() -> None:
    plan = running(workers=1024)
    assert len(reloaded(plan, plan.service, FOUR).specs) == 1024


def test_scaled_keeps_the_spares() -> None:
    before = running(workers=2, spares=2)
    assert [spec.is_spare for spec in before.all_specs] == [False, False, True, True]
    for workers in (1, 2, 600):
        plan = running(workers=600) if workers == 600 else before
        after = scaled(replace(plan, service=before.service), workers, FOUR)
        assert after.spare_specs == before.spare_specs
        assert after.all_specs == (*after.specs, *after.spare_specs)
    assert scaled(before, 0, FOUR).all_specs == ()


def test_a_spare_is_pinned_to_no_cpu() -> None:
    plan = running(workers=2, spares=1, policy="cpu")
    (spare,) = plan.spare_specs
    assert (spare.cpus, spare.cpu, spare.weight) == (FOUR.allowed, None, 1)


def test_there_are_no_spares_under_the_hash_of_the_kernel() -> None:
    plan = running(workers=2, spares=1, policy="kernel")
    assert (plan.spare_specs, plan.number_in_words) == ((), "2 workers")
    other = with_candidates(plan, plan.service, candidates(plan.service, "hash"), FOUR, "change")
    assert (len(other.spare_specs), other.number_in_words) == (1, "2 workers and 1 spare")


def test_room_for_spares_too() -> None:
    plan = running(workers=100, spares=100)
    assert plan.slots >= 2 * 200
    assert len(scaled(plan, 412, FOUR).all_specs) == 512
    words = "run 413 workers and 100 spares in demo: it was started with capacity for 512"
    with pytest.raises(ConfigError, match=words):
        scaled(plan, 413, FOUR)
