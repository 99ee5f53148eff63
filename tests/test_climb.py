"""Backends by what a service may do, and back up when it may do more: real capabilities dropped."""

from __future__ import annotations

import json
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from clients import BIND
from conftest import StartService
from crew import CPUS, PORT, pinned
from support import AS_IN_DOCKER, STEER, Service, http_get, setpriv

from steer.policy import CBPF, EBPF

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "nobody"),
    pytest.mark.usefixtures("netns"),
]
HOST = "127.0.0.1"
KEYS = ("policy", "policy_asked", "policy_reason", "backend", "backend_reason")


def slots(number: int, source: str = "") -> Counter[int]:
    """Who answers so many connections; of one address, all taken in by one CPU."""
    with pinned(CPUS[0]):
        return Counter(http_get(HOST, PORT, source=source)[1]["slot"] for _ in range(number))


def is_by_source() -> bool:
    """Whether each client's address has a worker of its own, and not all the same."""
    each = [set(slots(6, f"127.0.3.{host}")) for host in range(1, 17)]
    return all(len(one) == 1 for one in each) and len(set[int]().union(*each)) > 1


def is_by_kernel() -> bool:
    return any(len(set(slots(8, f"127.0.3.{host}"))) > 1 for host in range(1, 5))


def chosen(running: Service) -> tuple[str, str, str]:
    status = running.status()
    return status["policy"], status["policy_asked"], status["backend"]


# ---- what is there at the start

NO_PERFMON = "least-conn: load least-conn: the verifier refuses its loop; give CAP_PERFMON too"
NOT_COUNTED = "least-conn: count open connections: load program steer_open: EPERM; needs CAP_BPF"
NO_BPF = "ebpf: create BPF map steer_sockets: EPERM; needs CAP_BPF"
HELD = {
    "none": ((), "hash", CBPF, "least-conn needs ebpf", NO_BPF),
    "docker": (None, "hash", CBPF, "least-conn needs ebpf", NO_BPF),
    "bpf": (("bpf",), "hash", EBPF, NO_PERFMON, ""),
    "bpf, net_admin": (("bpf", "net_admin"), "hash", EBPF, NO_PERFMON, ""),
    "bpf, perfmon": (("bpf", "perfmon"), "hash", EBPF, NOT_COUNTED, ""),
    "all three": (
        *(("bpf", "net_admin", "perfmon"), "least-conn", EBPF),
        *("open connections are counted", ""),
    ),
}


@pytest.mark.parametrize("held, policy, backend, why, why_no_better", HELD.values(), ids=HELD)
def test_auto_is_what_the_capabilities_allow(
    service: StartService,
    home: Path,
    environment: dict[str, str],
    held: Sequence[str] | None,
    policy: str,
    backend: str,
    why: str,
    why_no_better: str,
) -> None:
    """It says so, `check` says the same, and it is what chooses."""
    under = AS_IN_DOCKER if held is None else setpriv(*held)
    check = subprocess.run(
        [*under, STEER, "check", *BIND, "--demo", "--json"],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    running = service("-w", "2", *BIND, under=under)
    status = running.status()
    assert chosen(running) == (policy, "auto", backend)
    assert status["policy_reason"].startswith(why)
    assert (status["backend_reason"] or "").startswith(why_no_better)
    assert bool(status["backend_reason"]) is bool(why_no_better)
    found = json.loads(check.stdout)
    assert {key: found[key] for key in KEYS} == {key: status[key] for key in KEYS}
    assert f"policy auto is {policy}, as {why}" in running.log
    assert slots(8).total() == 8
    if backend == EBPF:
        assert sum(running.selected().values()) == status["totals"]["unsteered"] + 8
    if policy == "least-conn":
        with ExitStack() as clients:
            for _ in range(6):
                clients.enter_context(socket.create_connection((HOST, PORT)))
            assert [each["connections"]["open"] for each in running.workers()] == [3, 3]
