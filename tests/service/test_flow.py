"""`flow`: over UDP, a flow stays with the worker that first got it."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from steer.policy.builtin import EBPF
from testkit.clients import freeze, send
from testkit.fixtures import StartService
from testkit.harness import PORT, Harness, host_of, sources
from testkit.processes import DEADLINE_S, eventually, is_ready

pytestmark = [pytest.mark.needs("bpf", "netns"), pytest.mark.usefixtures("netns")]
udp = pytest.mark.parametrize("kind", ["udp4", "udp6"])
Flows = dict[tuple[str, int], int]


def counters(harness: Harness) -> dict[str, int]:
    found = dict(harness.backend.policy_values().counters)
    stages = ("known", "new", "expired", "refused")
    assert found["total"] == sum(found[stage] for stage in stages), "they do not add up"
    return {stage: found[stage] for stage in stages if found[stage]}


def in_slots(flows: Mapping[object, int], *slots: int) -> bool:
    return set(flows.values()) == set(slots)


# ---- over a change of workers


@udp
def test_flows_stay_when_new_ones_go_elsewhere(kind: str) -> None:
    """As over a reload: 0 and 1 are of the old generation."""
    known, fresh = sources(host_of(kind), 100), sources(host_of(kind), 100, 30000)
    with Harness(EBPF, "flow", kind, workers=2) as harness:
        harness.join(0, 1)
        harness.steer()
        before = harness.flows(known)
        assert in_slots(before, 0, 1)
        harness.join(2, 3)
        harness.steer(2, 3)
        assert harness.flows(known) == before
        assert in_slots(harness.flows(fresh), 2, 3)
        assert harness.flows(known) == before
        assert counters(harness) == {"new": 200, "known": 200}


@udp
def test_new_flows_are_those_of_hash(kind: str) -> None:
    """In proportion to the weights, 6 standard deviations are allowed; and only once by chance."""
    clients = sources(host_of(kind), 1000)
    with Harness(EBPF, "flow", kind, workers=2, weights=(1, 3)).serving() as harness:
        first = harness.flows(clients)
        share = Counter(first.values())
        assert abs(share[1] - 750) <= 6 * (1000 * 0.25 * 0.75) ** 0.5
        harness.steer(0)
        assert harness.flows(clients) == first


@udp
def test_flows_of_one_that_has_ended_go_elsewhere_and_stay(kind: str) -> None:
    clients = sources(host_of(kind), 90)
    with Harness(EBPF, "flow", kind, workers=3).serving() as harness:
        before = harness.flows(clients)
        harness.steer(1, 2)
        harness.leave(0)
        harness.backend.take_counts(0)
        moved = [each for each in clients if before[each] == 0]
        after = harness.flows(clients)
        assert {each: after[each] for each in clients if before[each] != 0} == {
            each: before[each] for each in clients if before[each] != 0
        }
        assert in_slots({each: after[each] for each in moved}, 1, 2)
        # Whoever comes to the slot gets none of them back.
        harness.join(0)
        harness.steer(0, 1, 2)
        assert harness.flows(clients) == after
        stages = {"new": 90, "expired": len(moved), "known": 180 - len(moved)}
        assert counters(harness) == stages
        assert harness.backend.unsteered() == 0


@udp
def test_one_that_dies_unseen(kind: str) -> None:
    """Its socket is gone before the controller knows: no datagram is lost, nothing remembered."""
    clients = sources(host_of(kind), 60)
    with Harness(EBPF, "flow", kind, workers=3).serving() as harness:
        before = harness.flows(clients)
        harness.close_sockets(1)
        after = harness.flows(clients)
        assert in_slots(after, 0, 2)
        assert {each for each in clients if after[each] != before[each]} == {
            each for each in clients if before[each] == 1
        }
        assert counters(harness) == {"new": 60, "known": 60}


@udp
def test_flows_that_are_let_go_are_chosen_for_anew(kind: str) -> None:
    """Of one that hangs; back again, it gets new ones only."""
    clients = sources(host_of(kind), 90)
    with Harness(EBPF, "flow", kind, workers=3).serving() as harness:
        before = harness.flows(clients)
        harness.steer(0, 2)
        assert harness.flows(clients) == before
        harness.backend.forget_flows(1)
        after = harness.flows(clients)
        assert in_slots(after, 0, 2)
        harness.steer(0, 1, 2)
        assert harness.flows(clients) == after
        assert 1 in harness.flows(sources(host_of(kind), 90, 30000)).values()
        assert harness.backend.forget_flows


def test_a_flow_is_of_an_address_and_port_at_a_bind() -> None:
    """By IPv4 or by IPv6; where a bind is for all addresses, to whichever it is sent."""
    binds = ("udp://0.0.0.0:8080", "udp://[::]:8081")
    hosts = [f"127.0.0.{at}" for at in range(1, 41)]
    clients = [(host, 20000 + at) for host in hosts for at in range(2)]
    with Harness(EBPF, "flow", *binds, workers=2) as harness:
        harness.join(0, 1)
        harness.steer(0)
        harness.flows(clients[::2], 0, "127.0.0.1")
        harness.steer(1)
        assert in_slots(harness.flows(clients[1::2], 0, "127.0.0.1"), 1)
        assert in_slots(harness.flows(clients[::2], 0, "127.0.0.1"), 0)
        assert in_slots(harness.flows(clients[::2], 1, "127.0.0.1"), 1)
        assert in_slots(harness.flows(clients[::2], 0, "127.0.0.2"), 0)
        assert counters(harness) == {"new": 120, "known": 80}


def test_over_tcp_it_is_hash() -> None:
    with Harness(EBPF, "flow", "tcp4").serving() as harness:
        clients = sources("127.0.0.1", 100)
        first = harness.flows(clients)
        assert in_slots(first, 0, 1, 2, 3)
        assert harness.flows(clients) == first
        assert counters(harness) == {}


# ---- datagrams of clients that are not there


class Clients:
    """Datagrams from any address and port: raw(7), with a header of our own."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, numbers: Iterable[int], batch: int = 128) -> Counter[int]:
        """A datagram of each flow of that number; how many each slot got.

        Args:
            batch: so many at once; 222 fill a receive buffer of Debian's 6.12.
        """
        found: Counter[int] = Counter()
        left = list(numbers)
        while left:
            now, left = left[:batch], left[batch:]
            for number in now:
                self._sock.sendto(datagram(number), ("127.0.0.1", PORT))
            found.update(each.slot for each in self._harness.take(len(now)))
        return found

    def slot(self, number: int) -> int:
        (slot,) = self.send([number])
        return slot


def datagram(number: int) -> bytes:
    """From 127.128.0.0 and the bits above 8 of the number, from port 10000 and those below."""
    source = (127 << 24) + (128 << 16) + (number >> 8)
    port = 10000 + (number & 0xFF)
    udp_header = struct.pack("!HHHH", port, PORT, 9, 0)
    ip_header = struct.pack("!BBHHHBBHII", 0x45, 0, 0, 0, 0, 64, 17, 0, source, 0x7F000001)
    return ip_header + udp_header + b"x"


# ---- what is remembered, and for how long


def test_idle_flows_expire() -> None:
    """And go where new ones do; those in use do not."""
    with (
        Harness(EBPF, "flow", "udp4", workers=2, params=["idle=1"]) as harness,
        Clients(harness) as clients,
    ):
        harness.join(0, 1)
        harness.steer(0)
        clients.send(range(20))
        harness.steer(1)
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:
            assert clients.slot(0) == 0
            time.sleep(0.1)
        before = counters(harness)["known"]
        assert clients.send(range(20)) == {0: 1, 1: 19}
        assert clients.send(range(20)) == {0: 1, 1: 19}
        assert counters(harness) == {"new": 20, "expired": 19, "known": before + 21}


def test_when_full_the_idle_go_first() -> None:
    """1,024 fit; 200 of them are in use while 8,000 others come once each."""
    with (
        Harness(EBPF, "flow", "udp4", workers=2, params=["capacity=1024"]) as harness,
        Clients(harness) as clients,
    ):
        harness.join(0, 1)
        harness.steer(0)
        clients.send(range(200))
        harness.steer(1)
        for first in range(1000, 9000, 100):
            assert clients.send(range(first, first + 100)) == {1: 100}
            assert clients.send(range(200)) == {0: 200}
        assert counters(harness) == {"new": 8200, "known": 16000}
        # The first of the others are forgotten.
        harness.steer(0)
        assert clients.send(range(1000, 1100)) == {0: 100}


def test_as_many_as_fit_are_remembered() -> None:
    """But for those of a set that more than 16 came to by chance, which is one of 128 in half of
    all runs: there each takes the place of the next. Six such sets are not to be expected."""
    with (
        Harness(EBPF, "flow", "udp4", workers=2, params=["capacity=1024"]) as harness,
        Clients(harness) as clients,
    ):
        harness.join(0, 1)
        harness.steer(0)
        assert clients.send(range(1024)) == {0: 1024}
        harness.steer(1)
        assert clients.send(range(1024))[1] <= 5 * 20


def test_many_flows() -> None:
    """100,000 where there is room for a million: nobody takes a place from another."""
    params = ["capacity=1048576"]
    with (
        Harness(EBPF, "flow", "udp4", workers=2, params=params) as harness,
        Clients(harness) as clients,
    ):
        harness.join(0, 1)
        harness.steer(0)
        assert clients.send(range(100_000)) == {0: 100_000}
        harness.steer(1)
        assert clients.send(range(0, 100_000, 10)) == {0: 10_000}
        assert counters(harness) == {"new": 100_000, "known": 10_000}


def test_capacity_and_idle_time_are_said() -> None:
    with Harness(EBPF, "flow", "udp4", params=["capacity=2048", "idle=7"]) as harness:
        assert harness.backend.policy_values().params == {"capacity": 2048, "idle": 7}


@udp
def test_never_a_datagram_lost(kind: str) -> None:
    """While workers come, go, die and are forgotten."""
    with Harness(EBPF, "flow", kind, workers=4, params=["capacity=1024"]).serving() as harness:
        got = 0
        for turn in range(60):
            slot = turn % 4
            harness.steer(*(each for each in range(4) if each != slot))
            got += sum(harness.count(50).values())
            if turn % 3 == 0:
                harness.backend.forget_flows(slot)
            elif turn % 3 == 1:
                harness.leave(slot)
                harness.backend.take_counts(slot)
                got += sum(harness.count(50).values())
                harness.join(slot)
        assert got == 60 * 50 + 20 * 50
        assert harness.backend.unsteered() == 0
        assert sum(counters(harness).values()) == got


# ---- services


class Flow:
    """A client that stays where it is."""

    def __init__(self, stack: ExitStack) -> None:
        self._sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._sock.settimeout(DEADLINE_S)
        self._sock.connect(("127.0.0.1", PORT))

    def send(self) -> None:
        self._sock.send(b"")

    def ask(self) -> dict[str, int]:
        self._sock.send(b"")
        return self._answer()

    def insist(self) -> dict[str, int]:
        """Ask again what is not answered: what waits for a worker that is killed is lost."""
        self._sock.send(b"")
        while not is_ready(self._sock, 1.0):
            self._sock.send(b"")
        return self._answer()

    def _answer(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self._sock.recv(1000))
        return found


OPTIONS = ("-b", f"udp://127.0.0.1:{PORT}", "--policy=flow", "-w", "2")


def pids(flows: Iterable[Flow]) -> list[int]:
    return [each.ask()["pid"] for each in flows]


def test_reload(service: StartService, clients: ExitStack) -> None:
    """Old workers go on with their flows until these are idle, and then end."""
    running = service(*OPTIONS, "--param", "idle=2")
    old = {each["pid"] for each in running.workers()}
    flows = [Flow(clients) for _ in range(20)]
    before = pids(flows)
    running.ask("reload")
    fresh = [Flow(clients) for _ in range(20)]
    assert old.isdisjoint(pids(fresh))
    assert pids(flows) == before
    eventually(lambda: old.isdisjoint(each["pid"] for each in running.workers()))
    assert old.isdisjoint(pids(flows))
    assert "killed" not in running.log
    counted = running.status()["counters"]
    assert counted["total"] == sum(counted[each] for each in ("known", "new", "expired", "refused"))
    assert counted["total"] == 80


def test_reload_does_not_wait_for_ever(service: StartService, clients: ExitStack) -> None:
    """For flows that are never idle, as long as --graceful-timeout."""
    running = service(*OPTIONS, "--graceful-timeout=1")
    old = {each["pid"] for each in running.workers()}
    flows = [Flow(clients) for _ in range(8)]
    pids(flows)
    running.ask("reload")
    eventually(lambda: old.isdisjoint([each.insist()["pid"] for each in flows]))


def test_never_a_datagram_lost_over_reloads(service: StartService, clients: ExitStack) -> None:
    """Each is answered, of flows that go on and of new ones, and each is counted."""
    running = service(*OPTIONS, "--param", "idle=1")
    ended = threading.Event()

    def run() -> int:
        flows = [Flow(clients) for _ in range(10)]
        while not ended.is_set():
            flows.append(Flow(clients))
            pids(flows[-20:])
        return len(flows)

    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(run)
        try:
            for _ in range(3):
                running.ask("reload")
            running.ask("scale", workers=4)
            running.ask("scale", workers=2)
        finally:
            ended.set()
        flows = asked.result()
    found = running.status()
    # Each time one more was there, and the last twenty were asked.
    asked_times = sum(min(20, number) for number in range(11, flows + 1))
    assert found["counters"]["total"] == asked_times
    assert found["counters"]["new"] == flows
    assert found["totals"]["selected"] == asked_times
    assert found["totals"]["unsteered"] == 0


def test_drain(service: StartService, clients: ExitStack) -> None:
    """A drained worker keeps its flows and gets no new ones."""
    running = service(*OPTIONS)
    flows = [Flow(clients) for _ in range(20)]
    before = pids(flows)
    drained, other = running.workers()
    running.ask("drain", slot=drained["slot"])
    assert pids(flows) == before
    assert set(pids([Flow(clients) for _ in range(20)])) == {other["pid"]}
    running.ask("undrain", slot=drained["slot"])
    assert pids(flows) == before


def test_killed(service: StartService, clients: ExitStack) -> None:
    running = service(*OPTIONS)
    flows = [Flow(clients) for _ in range(20)]
    before = pids(flows)
    dead, other = running.workers()
    os.kill(dead["pid"], signal.SIGKILL)
    eventually(lambda: "killed by" in running.log)
    after = pids(flows)
    assert dead["pid"] not in after
    kept = [now for now, then in zip(after, before, strict=True) if then == other["pid"]]
    assert set(kept) == {other["pid"]}
    running.wait_ready()
    assert pids(flows) == after


def test_hung(service: StartService, clients: ExitStack) -> None:
    """Its flows go to another once it is seen to hang, and stay there."""
    running = service(*OPTIONS, "--hang-timeout=0.3", "--hang=skip")
    flows = [Flow(clients) for _ in range(20)]
    before = pids(flows)
    hung, other = running.workers()
    freeze(hung)
    for flow in flows:
        flow.send()
    eventually(lambda: running.workers()[0]["state"], "hung")
    theirs = [flow for flow, pid in zip(flows, before, strict=True) if pid == hung["pid"]]
    assert theirs
    assert set(pids(theirs)) == {other["pid"]}
    send(hung, signal.SIGCONT)
    eventually(lambda: running.workers()[0]["state"], "ready")


def test_another_controller_remembers(service: StartService, clients: ExitStack) -> None:
    first = service(*OPTIONS)
    flows = [Flow(clients) for _ in range(20)]
    before = pids(flows)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert pids(flows) == before
    second = service(*OPTIONS, ready=False).wait_ready(2)
    assert pids(flows) == before
    second.ask("drain", slot=0)
    assert pids(flows) == before
    assert second.status()["counters"]["known"] == 60
