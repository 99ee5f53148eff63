"""Workers that take their sockets out of their groups, or past the program: seen, said, mended."""

from __future__ import annotations

import json
import signal
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from steer.backends.membership import (
    Cure,
    Departure,
    cure,
)
from steer.config import address
from steer.policy.builtin import CBPF, EBPF, KERNEL
from steer.workers import drain
from testkit.clients import answer, http_get, request
from testkit.fixtures import StartService
from testkit.harness import PORT, Harness
from testkit.namespaces import Netns
from testkit.processes import eventually, is_ready
from testkit.programs import source
from testkit.service import Service, wound

D = Departure


# What workers do

APP = source("leaves_its_group")
ADDRESS = {
    "tcp": f"127.0.0.1:{PORT}",
    "udp": f"udp://127.0.0.1:{PORT}",
    "udp any": f"udp://0.0.0.0:{PORT}",
}


POLICY = {EBPF: "round-robin", CBPF: "hash", KERNEL: "kernel"}


def start(
    service: StartService,
    home: Path,
    bind: str,
    backend: str,
    *more: str,
    under: Sequence[str] = (),
) -> Service:
    (home / "leaves.py").write_text(APP)
    options = (f"--policy={POLICY[backend]}", f"--backend={backend}", "-w3", "-b", bind)
    return service(*options, "--graceful-timeout=5", *more, "leaves:serve", under=under)


def order(running: Service, home: Path, slot: int, act: str) -> int:
    """Have the worker there do it; its pid."""
    (pid,) = (each["pid"] for each in running.workers() if each["slot"] == slot)
    orders = home / f"orders-{pid}"
    (home / "orders").write_text(act)
    (home / "orders").rename(orders)
    eventually(lambda: not orders.exists())
    return int(pid)


def states(running: Service) -> dict[int, str]:
    return {each["slot"]: each["state"] for each in running.workers()}


_LOST_S = 5.0


def ask(protocol: str) -> int | None:
    """The slot that answers; None if the datagram is lost."""
    if protocol == "tcp":
        return int(http_get("127.0.0.1", PORT)[1]["slot"])
    with send("udp") as sock:
        return int(json.loads(sock.recv(1000))["slot"]) if is_ready(sock, _LOST_S) else None


def send(protocol: str) -> socket.socket:
    """A datagram that is not waited for, or a request in a connection that is kept."""
    if protocol == "tcp":
        return request("/held")
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", PORT))
    sock.send(b"")
    return sock


def spread(running: Service, protocol: str, requests: int = 60) -> Counter[int | None]:
    """Who answers, by slot."""
    return Counter(ask(protocol) for _ in range(requests))


def sees_all(running: Service, protocol: str, backend: str) -> None:
    """New requests are all answered, and by every worker in its share."""
    slots = {each["slot"] for each in running.workers()}
    found = spread(running, protocol)
    assert set(found) == slots, found
    for slot in slots if backend == CBPF else ():
        # Its program goes by the order in which the kernel has the sockets: is that known?
        assert running.steer("drain", str(slot)).returncode == 0
        assert set(spread(running, protocol, 30)) <= slots - {slot}
        assert running.steer("undrain", str(slot)).returncode == 0
    if backend == EBPF:
        assert min(found.values()) >= 60 / len(slots) - 2, found  # one turn for each CPU


@pytest.mark.needs("netns", "bpf")
@pytest.mark.parametrize("backend", [EBPF, CBPF])
def test_a_backend_goes_on_with_those_who_stay(netns: Netns, backend: str) -> None:
    """Before anybody has looked, too: the first socket is not one to attach through any more."""
    with Harness(backend, "hash", "udp4") as harness:
        harness.serving()
        harness.sockets[0][0].connect(("127.0.0.1", 9))
        found = [harness.backend.is_member(slot, 0) for slot in range(4)]
        assert found == [False, True, True, True]
        for chosen in range(1, 4):
            harness.steer(chosen)
            assert harness.count(20) == {chosen: 20}


REPLACED = [
    ("udp any", "connect", D.CONNECTED, (EBPF, CBPF, KERNEL)),
    ("udp any", "dissolve", D.DISSOLVED, (EBPF, CBPF)),
    ("udp", "connect", D.CONNECTED, (EBPF, CBPF)),
    ("udp", "dissolve", D.DISSOLVED, (EBPF, CBPF)),
    ("udp any", "device", D.ON_DEVICE, (EBPF, CBPF, KERNEL)),
    ("udp", "device", D.ON_DEVICE, (EBPF, CBPF, KERNEL)),
    ("udp", "close", D.CLOSED, (EBPF, CBPF, KERNEL)),
    ("tcp", "device", D.ON_DEVICE, (EBPF, CBPF, KERNEL)),
    ("tcp", "close", D.CLOSED, (EBPF, CBPF, KERNEL)),
    ("tcp", "shutdown", D.CLOSED, (EBPF, CBPF, KERNEL)),
]


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
@pytest.mark.parametrize(
    ("backend", "where", "act", "cause"),
    [(backend, *each[:3]) for each in REPLACED for backend in each[3]],
)
def test_a_worker_whose_socket_left_is_replaced(
    service: StartService, home: Path, backend: str, where: str, act: str, cause: Departure
) -> None:
    running = start(service, home, ADDRESS[where], backend)
    slot = 0 if backend == CBPF else 2  # the last of its group changes no order
    pid = order(running, home, slot, act)
    label = address.parse(ADDRESS[where]).label
    told = f"worker {slot}'s socket on {label} left the group: {cause.value}"
    eventually(lambda: told in running.log)
    eventually(lambda: pid not in [each["pid"] for each in running.workers()])
    running.wait_ready(3)
    sees_all(running, where[:3], backend)
    assert running.log.count("left the group") == 1
    assert [note for note in running.status()["notes"] if told in note]
    assert all(not each["left_group"] for each in running.workers())


MENDED = [
    ("udp", "alone", D.ALONE, (EBPF, CBPF, KERNEL)),
    ("tcp", "alone", D.ALONE, (EBPF, CBPF, KERNEL)),
    ("tcp", "relisten", D.RELISTENS, (EBPF,)),
]


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
@pytest.mark.parametrize(
    ("backend", "protocol", "act", "cause"),
    [(backend, *each[:3]) for each in MENDED for backend in each[3]],
)
def test_what_can_be_undone_is(
    service: StartService, home: Path, backend: str, protocol: str, act: str, cause: Departure
) -> None:
    running = start(service, home, ADDRESS[protocol], backend)
    before = [each["pid"] for each in running.workers()]
    order(running, home, 2, act)
    how = cure(cause, splits=False).value
    eventually(lambda: f"left the group: {cause.value}; {how}" in running.log)
    sees_all(running, protocol, backend)
    assert [each["pid"] for each in running.workers()] == before
    assert any(cause.value in note for note in running.status()["notes"])


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
def test_one_that_takes_everything_is_cut_off_before_another_is_there(
    service: StartService, home: Path
) -> None:
    """It may take long to start."""
    running = start(service, home, ADDRESS["udp any"], EBPF)
    (home / "late").touch()
    order(running, home, 2, "dissolve")
    eventually(lambda: "left the group" in running.log)
    assert [each["left_group"] for each in running.workers() if each["slot"] == 2] == [
        [f"udp 0.0.0.0:{PORT}: {D.DISSOLVED.value}"]
    ]
    assert set(spread(running, "udp")) == {0, 1}
    (home / "late").unlink()
    running.wait_ready(3)


@pytest.mark.needs("netns", "pidfd_getfd")
def test_on_the_kernels_hash_one_that_is_connected_is_only_told_of(
    service: StartService, home: Path
) -> None:
    """A new socket would be in a group with that one, and get everything. A reload heals."""
    running = start(service, home, ADDRESS["udp"], KERNEL)
    before = order(running, home, 2, "connect")
    told = f"left the group: {D.CONNECTED.value}; {Cure.TELL.value}"
    eventually(lambda: told in running.log)
    assert set(spread(running, "udp")) == {0, 1}
    assert before in [each["pid"] for each in running.workers()]
    assert any(told in note for note in running.status()["notes"])
    assert running.steer("reload").returncode == 0
    eventually(lambda: len(running.workers()), 3)
    sees_all(running, "udp", KERNEL)


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
@pytest.mark.parametrize("backend", [EBPF, CBPF])
def test_one_that_always_does_it_is_only_told_of_in_the_end(
    service: StartService, home: Path, backend: str
) -> None:
    soon = wound("steer.backends.membership._AFTER_S=(0.0, 0.2, 1.0)")
    running = start(service, home, ADDRESS["tcp"], backend, under=soon)
    (home / "always").write_text("device")
    order(running, home, 1, "device")
    told = "is not replaced again for its sockets, as that did not help"
    eventually(lambda: told in running.log)
    assert running.log.count("left the group") == 4
    assert any(told in note for note in running.status()["notes"])
    sees_all(running, "tcp", backend)


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
def test_a_worker_that_closed_its_listener_finishes_in_its_own_time(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """Others may have told it to end: a second signal could have it drop what it has."""
    running = start(service, home, ADDRESS["tcp"], EBPF, "--graceful-timeout=60")
    sock = clients.enter_context(request("/slow"))
    eventually(lambda: f"left the group: {D.CLOSED.value}" in running.log)
    running.wait_ready(3)  # a new one is there at once
    (old,) = (each for each in running.workers() if each["left_group"])
    eventually(lambda: states(running)[old["slot"]] == "stopping")
    assert set(spread(running, "tcp")) == states(running).keys() - {old["slot"]}
    assert not is_ready(sock, 2 * drain._LINGER_S)
    (home / "go").touch()
    assert answer(sock) == {"slot": old["slot"], "pid": old["pid"], "told": 0}
    eventually(lambda: old["pid"] not in [each["pid"] for each in running.workers()])


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
@pytest.mark.parametrize("backend", [EBPF, CBPF])
@pytest.mark.parametrize("where", ["tcp", "udp any"])
@pytest.mark.parametrize("act", ["attach", "detach"])
def test_a_program_that_a_worker_replaced_is_attached_again(
    service: StartService, home: Path, act: str, where: str, backend: str
) -> None:
    protocol = where[:3]
    running = start(service, home, ADDRESS[where], backend)
    assert running.steer("drain", "0").returncode == 0
    order(running, home, 0, act)
    eventually(lambda: 0 not in spread(running, protocol))
    assert set(spread(running, protocol)) == {1, 2}


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
@pytest.mark.parametrize(
    ("where", "act", "backend"),
    [
        ("tcp", "insist", EBPF),
        ("udp any", "insist", EBPF),
        ("udp", "insist_on_none", EBPF),
        ("udp", "insist_on_none", CBPF),
    ],
)
def test_what_goes_past_the_program_is_told_of(
    service: StartService, home: Path, clients: ExitStack, where: str, act: str, backend: str
) -> None:
    """One worker attaches a program of its own again and again, or detaches steer's."""
    protocol = where[:3]
    running = start(service, home, ADDRESS[where], backend, "--hang-timeout=0")
    label = address.parse(ADDRESS[where]).label
    told = f"what comes to {label} does not go by the policy: a worker may"
    order(running, home, 1, act)
    for slot in (0, 2) if protocol == "udp" else ():
        order(running, home, slot, "sleep")
    nobody = clients.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    while told not in running.log:
        clients.enter_context(send(protocol))
        is_ready(nobody, 0.2)
    assert any(told in note for note in running.status()["notes"])
    (home / "go").touch()
    eventually(lambda: set(spread(running, protocol)) == states(running).keys())
    sees_all(running, protocol, backend)
    assert running.log.count(told) == 1


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
@pytest.mark.parametrize("backend", [EBPF, CBPF])
@pytest.mark.parametrize("where", ["tcp", "udp", "udp any"])
def test_one_that_left_hinders_no_change(
    service: StartService, home: Path, where: str, backend: str
) -> None:
    """No program can be attached through its socket, nor can it be put into a table."""
    protocol = where[:3]
    running = start(service, home, ADDRESS[where], backend)
    assert running.steer("drain", "0").returncode == 0  # so it is not replaced
    order(running, home, 0, "connect" if protocol == "udp" else "shutdown")
    eventually(lambda: "left the group" in running.log)
    for policy in ("source", POLICY[backend]):
        done = running.steer("policy", policy)
        assert done.returncode == 0, done.stderr
    assert running.steer("drain", "1").returncode == 0
    assert set(spread(running, protocol, 20)) == {2}
    assert running.steer("undrain", "1").returncode == 0
    running.send_signal(signal.SIGUSR2)
    eventually(lambda: running.log.count("left the group"), 2)
    assert "not seen whether" not in running.log
    assert "[ERROR]" not in running.log
    assert set(spread(running, protocol)) == {1, 2}
    assert running.steer("undrain", "0").returncode == 0
    eventually(lambda: 0 not in states(running))
    running.wait_ready(3)
    sees_all(running, protocol, backend)
