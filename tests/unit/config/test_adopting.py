"""Services whose command opens its listeners itself: their two plans, and how they reload."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from steer.config import adopting, plan_change, planning, servers
from steer.config.service import Service
from steer.controller.own_reload import signal_for
from steer.errors import FallbackRefused
from steer.features import Answer, Finding
from steer.loader import find
from steer.policy.cpus import Topology
from steer.values import Invalid

TWO = Topology((0, 1), (0, 1), {})
YES = {"ebpf": Finding(Answer.YES), "cbpf": Finding(Answer.YES)}
NO = {**YES, "ebpf": Finding(Answer.NO, "EPERM")}


def adopts(**keys: Any) -> Service:
    return Service(socket="adopt", **{"command": ("nginx",), "bind": (":80",), **keys})


def listeners(service: Service, findings: Mapping[str, Finding] = YES) -> tuple[str, str | None]:
    plan = adopting.listeners(service, TWO, findings, find.find(service.policy))
    assert plan.binds == service.binds
    return plan.backends[0].backend, plan.backends[0].reason


def test_servers_get_no_sockets_and_no_policy() -> None:
    service = adopts(instances=3, workers=6, policy="round-robin", weights=(1, 2), strict=True)
    plan = planning.plan(adopting.servers(service), TWO, NO)
    assert (plan.binds, plan.policy.name, len(plan.specs)) == ((), "kernel", 3)


def test_listeners_are_steered_by_ebpf_or_not_at_all() -> None:
    assert listeners(adopts(policy="hash")) == ("ebpf", None)
    assert listeners(adopts(policy="hash"), NO) == ("kernel", "ebpf: EPERM")
    assert listeners(adopts(policy="kernel")) == ("kernel", None)
    assert listeners(adopts(backend="kernel")) == ("kernel", None)
    with pytest.raises(FallbackRefused, match="EPERM"):
        listeners(adopts(policy="hash", strict=True), NO)


def test_servers_are_scaled_and_not_listeners() -> None:
    plan = planning.plan(adopting.servers(adopts(workers=8)), TWO, YES)
    scaled = plan_change.scaled(plan, 3, TWO)
    assert (scaled.service.instances, scaled.service.workers, len(scaled.specs)) == (3, 8, 3)


def test_server_reloads_itself_unless_a_start_is_needed() -> None:
    def signal_of(before: Service, after: Service) -> int | None:
        plans = [planning.plan(adopting.servers(each), TWO, YES) for each in (before, after)]
        return signal_for(plans[0], plans[1])

    assert signal_of(adopts(), adopts()) == signal.SIGHUP
    assert signal_of(adopts(), adopts(policy="hash", graceful_timeout=1.0)) == signal.SIGHUP
    assert signal_of(adopts(), adopts(env=("A=1",))) is None
    assert signal_of(adopts(), adopts(command=("nginx", "-e", "stderr"))) is None
    assert signal_of(adopts(), adopts(reload_signal="none")) is None
    assert signal_of(adopts(), adopts(reload_signal="usr1")) == signal.SIGUSR1
    assert signal_of(Service(command=("nginx",)), Service(command=("nginx",))) is None


@pytest.mark.parametrize(
    "command, number",
    [
        (("/usr/sbin/nginx", "-c", "x"), signal.SIGHUP),
        (("python3", "-m", "gunicorn", "app:app"), signal.SIGHUP),
        (("haproxy", "-f", "x"), None),
        (("haproxy", "-W", "-f", "x"), signal.SIGUSR2),
        (("granian", "app:app"), None),
        (("sleep", "1"), None),
    ],
)
def test_signal_of_a_reload_is_known(command: Sequence[str], number: int | None) -> None:
    assert servers.reload_signal(command) == number


@pytest.mark.parametrize("name", ["TERM", "KILL", "STOP", "NOSUCH"])
def test_signal_that_reloads_nothing_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        servers.read_reload_signal(name)


def test_cure_names_the_server() -> None:
    assert servers.reuseport_cure(("gunicorn",)) == "add to its command: --reuse-port"
    assert "add to its command: --fd {fd}" in servers.reuseport_cure(("uvicorn",))
    why, cure = servers.why_it_ended(("gunicorn",), 1, "Address already in use", adopts=True)
    assert (why, cure) == (
        "the address is in use by a socket without SO_REUSEPORT",
        "add to its command: --reuse-port",
    )
