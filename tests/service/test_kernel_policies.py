"""Every policy on the kernel: real sockets, in a network namespace of the test's own.

Expectations are exact wherever the kernel is. Where chance decides, the bounds are six standard
deviations: wrong once in half a billion times.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from math import sqrt

import pytest

from steer.abi import SO_DETACH_REUSEPORT_BPF
from steer.linux import port_holders, topology
from steer.policy.builtin import CBPF, EBPF, KERNEL, POLICIES
from steer.policy.cpus import Topology
from steer.sockets import listeners, reuseport
from testkit.clients import http_get, udp_ask
from testkit.fixtures import StartService
from testkit.harness import CPUS, KINDS, PORT, Harness, host_of, pinned, sources
from testkit.namespaces import Netns
from testkit.packets import segment
from testkit.processes import DEADLINE_S, eventually, tcp_count

pytestmark = [pytest.mark.needs("bpf"), pytest.mark.usefixtures("netns")]

POSSIBLE = topology.read().possible
PROGRAMS = [(p.name, b) for p in POLICIES.values() for b in p.backends if b != KERNEL]
EVERYTHING = [(p.name, b) for p in POLICIES.values() for b in p.backends]

all_kinds = pytest.mark.parametrize("kind", KINDS)
tcp_kinds = pytest.mark.parametrize("kind", ["tcp4", "tcp6"])
both_backends = pytest.mark.parametrize("backend", [EBPF, CBPF])
all_programs = pytest.mark.parametrize("policy, backend", PROGRAMS)


def fair(counts: Mapping[int, int], weights: Sequence[int]) -> bool:
    """Whether slots got by chance what is in proportion to their weights."""
    number, total = sum(counts.values()), sum(weights)
    shares = [weight / total for weight in weights]
    return set(counts) <= set(range(len(weights))) and all(
        abs(counts.get(slot, 0) - number * share) <= 6 * sqrt(number * share * (1 - share))
        for slot, share in enumerate(shares)
    )


def had_program(sock: socket.socket) -> bool:
    """Take the program from the socket's group; whether there was one."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
    except FileNotFoundError:
        return False
    return True


# ---- all policies


@all_kinds
@pytest.mark.parametrize("policy, backend", EVERYTHING)
def test_all_arrive_and_are_counted(policy: str, backend: str, kind: str) -> None:
    with Harness(backend, policy, kind).serving() as harness:
        got = harness.count(120)
        if backend == EBPF:
            assert harness.selected() == got
            assert harness.backend.unsteered() == 0
        else:
            assert harness.backend.counts(0) is None
            assert harness.backend.unsteered() is None
        assert had_program(harness.sockets[0][0]) == (backend != KERNEL)


@all_programs
def test_binds_are_steered_and_counted_together(policy: str, backend: str) -> None:
    with Harness(backend, policy, *KINDS).serving() as harness:
        got = [harness.count(30, bind) for bind in range(len(KINDS))]
        if backend == EBPF:
            assert harness.selected() == sum(got, Counter())


@pytest.mark.needs("root")
@pytest.mark.parametrize("flags", [0x00, 0x04, 0x10, 0x11, 0x14], ids=hex)
def test_late_segment_is_no_connection(flags: int) -> None:
    """A FIN, RST or ACK whose connection is gone comes to the listeners too."""
    with Harness(EBPF, "round-robin", "tcp4", workers=2).serving() as harness, pinned(CPUS[0]):
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            for _ in range(3):
                raw.sendto(segment(3333, PORT, flags), ("127.0.0.1", 0))
        assert harness.count(10) == {0: 5, 1: 5}
        assert harness.selected() == {0: 5, 1: 5}
        harness.backend.steer([])
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            raw.sendto(segment(3333, PORT, flags), ("127.0.0.1", 0))
        harness.count(1)
        assert harness.backend.unsteered() == 1


@pytest.mark.parametrize("order", [("0.0.0.0", "[::]"), ("[::]", "0.0.0.0")])
@pytest.mark.parametrize("scheme", ["tcp", "udp"])
@pytest.mark.parametrize("policy, backend", EVERYTHING)
def test_dual_stack(policy: str, backend: str, scheme: str, order: Sequence[str]) -> None:
    """The two wildcards are two groups, and IPv4 goes to the IPv4 one."""
    binds = [f"{scheme}://{host}:{PORT}" for host in order]
    with Harness(backend, policy, *binds).serving() as harness:
        got = harness.count(40, order.index("0.0.0.0"), "127.0.0.1")
        got += harness.count(40, order.index("[::]"), "::1")
        if backend == EBPF:
            assert harness.selected() == got


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
@pytest.mark.parametrize("policy, backend", EVERYTHING)
def test_ipv4_on_an_ipv6_wildcard(policy: str, backend: str, scheme: str) -> None:
    with Harness(backend, policy, f"{scheme}://[::]:{PORT}").serving() as harness:
        first = harness.flows(sources("127.0.0.1", 60), host="127.0.0.1")
        assert len(first) == 60
        again = harness.flows(sources("127.0.0.1", 60), host="127.0.0.1")
        if policy in ("hash", "kernel"):
            assert first == again
            assert len(set(first.values())) == 4
        if backend == EBPF:
            assert harness.selected() == Counter([*first.values(), *again.values()])


@all_kinds
@all_programs
def test_half_of_32_leave(policy: str, backend: str, kind: str) -> None:
    gone, live = range(0, 32, 2), range(1, 32, 2)
    with Harness(backend, policy, kind, workers=32).serving() as harness:
        harness.count(64)
        harness.leave(*gone)
        harness.steer()
        before = Counter(harness.selected())
        got = harness.count(320)
        assert set(got) <= set(live)
        if backend == EBPF:
            assert Counter(harness.selected()) - before == got
            assert harness.backend.unsteered() == 0


# ---- cpu


@all_kinds
@both_backends
@pytest.mark.parametrize("order", [1, -1], ids=["forward", "reverse"])
def test_cpu_takes_the_worker_pinned_to_it(backend: str, kind: str, order: int) -> None:
    with Harness(backend, "cpu", kind, workers=len(CPUS)) as harness:
        harness.join(*range(len(CPUS))[::order])
        harness.steer()
        for cpu in CPUS:
            with pinned(cpu):
                [slot] = [spec.number for spec in harness.plan.specs if spec.cpu == cpu]
                assert harness.count(50) == {slot: 50}
        assert "at random" not in " ".join(harness.backend.notes)


@all_kinds
@both_backends
def test_cpu_with_slots_dealt_in_reverse(backend: str, kind: str) -> None:
    real = topology.read()
    backward = Topology(CPUS[::-1], real.possible, real.node_of)
    with Harness(backend, "cpu", kind, workers=len(CPUS), machine=backward).serving() as harness:
        spec_on = {spec.cpu: spec.number for spec in harness.plan.specs}
        assert spec_on[CPUS[-1]] <= spec_on[CPUS[0]]
        for cpu in CPUS:
            with pinned(cpu):
                assert harness.count(50) == {spec_on[cpu]: 50}


@all_kinds
def test_cpu_shared_by_workers_is_taken_in_turn(kind: str) -> None:
    with Harness(EBPF, "cpu", kind, workers=3 * len(CPUS)).serving() as harness:
        for cpu in CPUS:
            mine = [spec.number for spec in harness.plan.specs if spec.cpu == cpu]
            with pinned(cpu):
                assert len(mine) == 3
                assert harness.count(60) == dict.fromkeys(mine, 20)


@all_kinds
def test_cpu_shared_by_workers_of_different_weight(kind: str) -> None:
    weights = [3] * len(CPUS) + [1] * len(CPUS)
    with Harness(EBPF, "cpu", kind, workers=len(weights), weights=weights).serving() as harness:
        for slot, cpu in enumerate(harness.plan.specs[i].cpu for i in range(len(CPUS))):
            with pinned(cpu):
                assert harness.count(40) == {slot: 30, slot + len(CPUS): 10}


@all_kinds
def test_cpu_shared_by_workers_is_left_to_chance_by_cbpf(kind: str) -> None:
    with Harness(CBPF, "cpu", kind, workers=2 * len(CPUS)).serving() as harness:
        assert "at random" in " ".join(harness.backend.notes)
        for cpu in CPUS:
            mine = [spec.number for spec in harness.plan.specs if spec.cpu == cpu]
            with pinned(cpu):
                got = harness.count(400)
            assert fair({mine.index(slot): number for slot, number in got.items()}, [1, 1])


@all_kinds
@both_backends
def test_one_worker_serves_every_cpu(backend: str, kind: str) -> None:
    with Harness(backend, "cpu", kind, workers=1).serving() as harness:
        for cpu in CPUS:
            with pinned(cpu):
                assert harness.count(20) == {0: 20}


@both_backends
def test_cpu_without_a_worker_goes_to_one_on_its_node(backend: str) -> None:
    """The last CPU is on node 1 with one that only we know of; all others on node 0."""
    stray, made_up = CPUS[-1], max(POSSIBLE) + 5
    nodes = {**dict.fromkeys(POSSIBLE, 0), stray: 1, made_up: 1}
    machine = Topology((CPUS[0], made_up), (*POSSIBLE, made_up), nodes)
    with Harness(backend, "cpu", "tcp4", workers=2, machine=machine).serving() as harness:
        with pinned(stray):
            assert harness.count(20) == {1: 20}
        for cpu in CPUS[:-1]:
            with pinned(cpu):
                assert harness.count(20) == {0: 20}


# ---- round-robin


@all_kinds
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_each_cpu_goes_through_the_workers_in_turn(kind: str, workers: int) -> None:
    with Harness(EBPF, "round-robin", kind, workers=workers).serving() as harness:
        for position, cpu in enumerate(POSSIBLE):
            if cpu in CPUS:
                first = workers * position // len(POSSIBLE)
                turns = [(first + i) % workers for i in range(2 * workers + 1)]
                with pinned(cpu):
                    assert harness.sequence(len(turns)) == turns


@all_kinds
def test_turns_of_all_cpus_together(kind: str) -> None:
    with Harness(EBPF, "round-robin", kind, workers=4).serving() as harness:
        got: Counter[int] = Counter()
        for number in (3, 17, 10, 1):
            for cpu in CPUS:
                with pinned(cpu):
                    got += harness.count(number)
        assert max(got.values()) - min(got[slot] for slot in range(4)) <= len(CPUS)


@tcp_kinds
@pytest.mark.parametrize("workers", [2, 4])
def test_turns_with_syn_cookies(netns: Netns, kind: str, workers: int) -> None:
    netns.sysctl("net.ipv4.tcp_syncookies", 2)
    with Harness(EBPF, "round-robin", kind, workers=workers).serving() as harness, pinned(CPUS[0]):
        evenly = dict.fromkeys(range(workers), 40 // workers)
        assert harness.count(40) == evenly
        assert harness.selected() == evenly
    assert tcp_count("SyncookiesRecv") == 40


@all_kinds
def test_turns_with_weights(kind: str) -> None:
    with Harness(EBPF, "round-robin", kind, workers=3, weights=[3, 1, 2]).serving() as harness:
        for cpu in CPUS:
            with pinned(cpu):
                assert harness.count(60) == {0: 30, 1: 10, 2: 20}


@all_kinds
def test_turns_go_on_when_workers_come_and_go(kind: str) -> None:
    with Harness(EBPF, "round-robin", kind, workers=4).serving() as harness, pinned(CPUS[0]):
        harness.count(3)
        harness.steer(1, 3)
        assert harness.count(40) == {1: 20, 3: 20}
        harness.leave(0)
        harness.join(7)
        harness.steer()
        assert harness.count(40) == dict.fromkeys([1, 2, 3, 7], 10)


@all_kinds
def test_32_sockets_put_in_reverse_are_taken_in_order(kind: str) -> None:
    with Harness(EBPF, "round-robin", kind, workers=32) as harness, pinned(CPUS[0]):
        harness.join(*reversed(range(32)))
        harness.steer()
        first = 32 * POSSIBLE.index(CPUS[0]) // len(POSSIBLE)
        assert harness.sequence(64) == [(first + i) % 32 for i in range(64)]


# ---- hash

FLOWS = 500


@all_kinds
@both_backends
def test_a_flow_has_its_slot(backend: str, kind: str) -> None:
    with Harness(backend, "hash", kind).serving() as harness:
        flows = harness.flows(sources(host_of(kind), FLOWS))
        assert len(flows) == FLOWS
        assert fair(Counter(flows.values()), [1] * 4)
        assert harness.flows(flows) == flows


@pytest.mark.parametrize("kind", ["udp4", "udp6"])
@both_backends
def test_datagrams_of_a_connected_socket_stay_together(backend: str, kind: str) -> None:
    with (
        Harness(backend, "hash", kind).serving() as harness,
        harness.send(harness.binds[0]) as client,
    ):
        for _ in range(9):
            client.send(b"x")
        assert len({each.slot for each in harness.take(10)}) == 1


@all_kinds
@both_backends
def test_only_the_flows_of_a_leaver_move(backend: str, kind: str) -> None:
    with Harness(backend, "hash", kind).serving() as harness:
        before = harness.flows(sources(host_of(kind), FLOWS))
        harness.leave(2)
        harness.steer()
        after = harness.flows(before)
        assert {flow for flow in before if before[flow] != after[flow]} == {
            flow for flow in before if before[flow] == 2
        }
        moved = Counter(after[flow] for flow in before if before[flow] == 2)
        assert set(moved) == {0, 1, 3}
        harness.join(4)
        harness.steer()
        at_last = harness.flows(before)
        assert {at_last[flow] for flow in after if after[flow] != at_last[flow]} == {4}
        assert fair(Counter(slot if slot != 4 else 2 for slot in at_last.values()), [1] * 4)


@all_kinds
@both_backends
def test_hash_with_weights(backend: str, kind: str) -> None:
    with Harness(backend, "hash", kind, workers=3, weights=[1, 2, 5]).serving() as harness:
        assert fair(harness.count(1500), [1, 2, 5])


# ---- random


@all_kinds
@both_backends
@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1, 2, 5]], ids=str)
def test_random_is_in_proportion(backend: str, kind: str, weights: Sequence[int]) -> None:
    with Harness(
        backend, "random", kind, workers=len(weights), weights=weights
    ).serving() as harness:
        for cpu in CPUS:
            with pinned(cpu):
                assert fair(harness.count(1000), weights)


@both_backends
def test_random_does_not_follow_the_flow(backend: str) -> None:
    with Harness(backend, "random", "udp4", workers=2).serving() as harness:
        flows = [harness.flows(sources("127.0.0.1", 30)) for _ in range(2)]
        assert flows[0] != flows[1]  # alike once in 2**30


# ---- kernel


@all_kinds
def test_kernel_hashes_over_all_sockets(kind: str) -> None:
    with Harness(KERNEL, "kernel", kind).serving() as harness:
        flows = harness.flows(sources(host_of(kind), FLOWS))
        assert fair(Counter(flows.values()), [1] * 4)
        assert harness.flows(flows) == flows


# ---- slots without a socket


@all_kinds
def test_spare_takes_what_was_meant_for_a_missing_socket(kind: str) -> None:
    with Harness(EBPF, "round-robin", kind, workers=4).serving() as harness, pinned(CPUS[0]):
        harness.leave(1)
        got = harness.count(80)
        counts = {slot: harness.backend.counts(slot) for slot in range(4)}
        assert got == harness.selected()
        assert sum(count.selected for count in counts.values() if count) == 80
        assert sum(count.fallback for count in counts.values() if count) == 20
        assert all(got[slot] >= 20 for slot in (0, 2, 3))
        assert harness.backend.unsteered() == 0


@all_kinds
def test_kernel_hash_takes_what_no_spare_does(kind: str) -> None:
    """Four spares are tried; with seven of eight gone the eighth is often not among them."""
    with Harness(EBPF, "round-robin", kind, workers=8).serving() as harness, pinned(CPUS[0]):
        harness.leave(*range(7))
        assert harness.count(400) == {7: 400}
        count = harness.backend.counts(7)
        unsteered = harness.backend.unsteered()
        assert count
        assert unsteered
        assert count.selected == 50 + count.fallback == 400 - unsteered
        assert fair({0: count.fallback, 1: unsteered}, [1, 1])


@all_kinds
@all_programs
def test_no_live_slot_leaves_the_choice_to_the_kernel(policy: str, backend: str, kind: str) -> None:
    """Only slots 2 and 3 are chosen, and then they are gone; 0 and 1 are there."""
    with Harness(backend, policy, kind, workers=4) as harness:
        harness.join(0, 1, 2, 3)
        harness.steer(2, 3)
        harness.leave(2, 3)
        got = harness.count(200)
        assert fair(got, [1, 1])
        if backend == EBPF:
            assert harness.backend.unsteered() == 200
            assert harness.selected() == {}


@pytest.mark.needs("migrate")
@tcp_kinds
@pytest.mark.parametrize("policy", [name for name, backend in PROGRAMS if backend == EBPF])
def test_no_live_slot_and_all_waits_in_a_backup_listener(policy: str, kind: str) -> None:
    """Before anybody has seen that they are gone, and whoever else is in the group: slot 2
    listens there already, but has not joined."""
    with Harness(EBPF, policy, kind, workers=3) as harness:
        harness.join(0, 1)
        harness.backend.backup.open()
        harness.steer()
        with reuseport.member(harness.binds[0], 64) as starting, ExitStack() as clients:
            harness.leave(0, 1)
            for _ in range(40):
                clients.enter_context(harness.send(harness.binds[0]))
            everybody = [starting, *harness.backend.backup.sockets]
            eventually(lambda: sum(listeners.waiting(sock).queued for sock in everybody), 40)
            assert harness.backend.open(harness.plan.slots) == 40
            assert harness.backend.unsteered() == 0


@all_kinds
@all_programs
@pytest.mark.parametrize("when", ["before anybody is", "nobody is", "nobody is any more"])
def test_with_nobody_to_choose_the_kernel_does(
    policy: str, backend: str, kind: str, when: str
) -> None:
    with Harness(backend, policy, kind, workers=3) as harness:
        harness.join(0, 1)
        if when == "nobody is any more":
            harness.steer()
            harness.count(10)
        if when != "before anybody is":
            harness.backend.steer([])
            harness.join(2)
            harness.leave(2)
        before = harness.selected()
        known = harness.backend.policy_values().counters.get("known", 0)
        assert fair(harness.count(200), [1, 1])
        if backend == EBPF:
            # A source port may be one of before, and then its flow may have a worker.
            known = harness.backend.policy_values().counters.get("known", 0) - known
            unsteered = harness.backend.unsteered()
            assert unsteered is not None
            assert 200 - known <= unsteered <= 200
            steered = sum(harness.selected().values()) - sum(before.values())
            assert steered == 200 - unsteered
        else:
            assert harness.selected() == before


@all_programs
def test_a_slot_begins_anew(policy: str, backend: str) -> None:
    with Harness(backend, policy, "tcp4", "udp4", workers=1).serving() as harness:
        harness.count(20, 0)
        harness.count(20, 1)
        counted = harness.backend.take_counts(0)
        assert (counted.selected if counted else None) == (40 if backend == EBPF else None)
        harness.count(5)
        counted = harness.backend.counts(0)
        assert (counted.selected if counted else None) == (5 if backend == EBPF else None)


@all_programs
def test_a_group_is_steered_again_after_it_was_empty(policy: str, backend: str) -> None:
    """With its last socket a group loses its program."""
    with Harness(backend, policy, "tcp4", workers=2).serving() as harness:
        harness.leave(0, 1)
        harness.join(0, 1)
        harness.steer(1)
        assert harness.count(40) == {1: 40}


# ---- migration


def queued(listener: socket.socket) -> int:
    """Length of the accept queue: tcpi_unacked of struct tcp_info (tcp_get_info())."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return int.from_bytes(info[24:28], sys.byteorder)


@pytest.fixture
def clients() -> Iterator[list[socket.socket]]:
    made: list[socket.socket] = []
    yield made
    for client in made:
        client.close()


def queue(harness: Harness, clients: list[socket.socket], slot: int, number: int) -> None:
    """Connect to `slot`, the only one chosen; nobody accepts."""
    harness.steer(slot)
    clients += [harness.send(harness.binds[0]) for _ in range(number)]
    eventually(lambda: queued(harness.sockets[slot][0]), number)


@tcp_kinds
@pytest.mark.needs("migrate")
@pytest.mark.parametrize("policy", ["cpu", "round-robin", "hash", "random"])
def test_queue_of_a_worker_no_longer_chosen_goes_to_another(
    policy: str, kind: str, clients: list[socket.socket]
) -> None:
    with Harness(EBPF, policy, kind, workers=3) as harness:
        harness.join(0, 1, 2)
        queue(harness, clients, 0, 7)
        harness.steer(1)
        harness.leave(0)
        assert Counter(each.slot for each in harness.take(7)) == {1: 7}
        count = harness.backend.counts(1)
        assert count
        assert (count.selected, count.fallback, count.migrated) == (7, 0, 7)


@tcp_kinds
@pytest.mark.needs("migrate")
def test_queue_of_a_worker_that_dies_goes_to_a_spare(
    kind: str, clients: list[socket.socket]
) -> None:
    """Its sockets are closed before anybody can take it out of the table."""
    with Harness(EBPF, "round-robin", kind, workers=2) as harness:
        harness.join(0, 1)
        queue(harness, clients, 0, 8)
        harness.steer(0, 1)
        harness.close_sockets(0)
        assert Counter(each.slot for each in harness.take(8)) == {1: 8}
        count = harness.backend.counts(1)
        assert count
        assert (count.selected, count.fallback, count.migrated) == (8, 4, 8)


@tcp_kinds
@pytest.mark.needs("migrate")
def test_queue_of_the_only_worker_chosen_goes_to_any(
    kind: str, clients: list[socket.socket]
) -> None:
    with Harness(EBPF, "hash", kind, workers=2) as harness:
        harness.join(0, 1)
        queue(harness, clients, 0, 7)
        harness.close_sockets(0)
        assert Counter(each.slot for each in harness.take(7)) == {1: 7}
        assert harness.backend.unsteered() == 7


@tcp_kinds
@pytest.mark.needs("migrate")
def test_queue_is_reset_when_nobody_is_left(kind: str, clients: list[socket.socket]) -> None:
    with Harness(EBPF, "hash", kind, workers=1) as harness:
        harness.join(0)
        queue(harness, clients, 0, 3)
        harness.leave(0)
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.recv(1)


# ---- changes under traffic


class Flood:
    """A thread that sends datagrams, but no more than fit on the way."""

    WINDOW = 200

    def __init__(self, harness: Harness) -> None:
        self.sent = self.taken = 0
        self._ending = threading.Event()
        self._client = harness.send(harness.binds[0])
        self.sent += 1
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._client.close()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()

    def _send(self) -> None:
        while not self._ending.is_set():
            if self.sent - self.taken < self.WINDOW:
                self._client.send(b"x")
                self.sent += 1
            else:
                self._ending.wait(0.0001)


@pytest.mark.parametrize("kind", ["udp4", "udp6"])
@pytest.mark.parametrize("policy, backend", [("round-robin", EBPF), ("hash", CBPF)])
def test_no_datagram_is_lost_while_tables_change(policy: str, backend: str, kind: str) -> None:
    with Harness(backend, policy, kind, workers=4) as harness:
        harness.join(0, 1, 2, 3)
        harness.steer(0)
        got: Counter[int] = Counter()
        changes = cycle([(1,), (0, 1), (0, 2), (0,)])
        with Flood(harness) as flood:
            made = 0
            while made < 200 or flood.sent < 2000:
                harness.steer(*next(changes))
                got += Counter(each.slot for each in harness.take_ready())
                flood.taken = got.total()
                made += 1
            flood.end()
            got += Counter(each.slot for each in harness.take(flood.sent - got.total()))
        assert set(got) <= {0, 1, 2}
        if backend == EBPF:
            assert set(got) == {0, 1, 2}
            counts = [harness.backend.counts(slot) for slot in range(4)]
            assert [count.selected for count in counts if count] == [got[i] for i in range(4)]
            assert not any(count.fallback for count in counts if count)
            assert harness.backend.unsteered() == 0


# ---- services from end to end


def ask(kind: str) -> tuple[int, Mapping[str, object]]:
    """A request to the demo: the slot that answered, and all it said."""
    if kind.startswith("udp"):
        answer = udp_ask(host_of(kind), PORT)
        return answer["slot"], answer
    fields, answer = http_get(host_of(kind), PORT)
    assert fields["x-steer-slot"] == str(answer["slot"])
    return answer["slot"], answer


def binds(*kinds: str) -> list[str]:
    return [word for kind in kinds or KINDS for word in ("-b", KINDS[kind])]


def test_service_by_cpu(service: StartService) -> None:
    made = service("-w", str(2 * len(CPUS)), "--policy", "cpu", *binds())
    answers: Counter[int] = Counter()
    cpus_of = {each["slot"]: each["cpus"] for each in made.workers()}
    for cpu in CPUS:
        for kind in KINDS:
            with pinned(cpu):
                asked = [ask(kind) for _ in range(6)]
            answers += Counter(slot for slot, _ in asked)
            assert all(cpus_of[slot] == [cpu] == [answer["cpu"]] for slot, answer in asked)
            assert [slot for slot, _ in asked[::2]] != [slot for slot, _ in asked[1::2]]
    assert made.selected() == answers
    status = made.status()
    assert (status["policy"], status["backend"]) == ("cpu", "ebpf")
    assert status["backend_reason"] is None
    assert status["totals"] == {
        "selected": answers.total(),
        "fallback": 0,
        "unsteered": 0,
        "migrated": 0,
    }


def test_service_in_turn_by_weight(service: StartService) -> None:
    made = service("-w", "2", "--policy", "round-robin", "--weights", "3,1", *binds())
    with pinned(CPUS[0]):
        got = Counter(ask(kind)[0] for kind in KINDS for _ in range(20))
    assert got == {0: 60, 1: 20}
    assert made.selected() == got
    assert [each["weight"] for each in made.workers()] == [3, 1]


@pytest.mark.parametrize("backend", [EBPF, CBPF, KERNEL])
def test_service_by_hash(service: StartService, backend: str) -> None:
    made = service("-w", "3", "--policy", "hash", "--backend", backend, *binds("tcp4", "udp6"))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect((host_of("udp6"), PORT))
        for _ in range(10):
            client.send(b"")
        assert len({client.recv(512) for _ in range(10)}) == 1
    answers = Counter(ask("tcp4")[0] for _ in range(30))
    status = made.status()
    assert status["backend"] == backend
    if backend == EBPF:
        assert status["totals"]["selected"] == 40
        assert answers <= Counter(made.selected())
    else:
        assert backend in status["backend_reason"]
        assert made.selected() == {0: None, 1: None, 2: None}
        assert set(status["totals"].values()) == {None}


def test_service_that_leaves_it_to_the_kernel(service: StartService) -> None:
    made = service("-w", "2", "--policy", "kernel", *binds())
    for kind in KINDS:
        ask(kind)
    status = made.status()
    assert (status["policy"], status["backend"]) == ("kernel", "kernel")
    assert status["backend_reason"] is None


@pytest.mark.parametrize("order", [("0.0.0.0", "[::]"), ("[::]", "0.0.0.0")])
def test_service_on_both_wildcards(service: StartService, order: Sequence[str]) -> None:
    both = [word for host in order for word in ("-b", f"{host}:{PORT}")]
    made = service("-w", "2", "--policy", "round-robin", *both)
    with pinned(CPUS[0]):
        got = Counter(ask(kind)[0] for kind in ("tcp4", "tcp6") for _ in range(10))
    assert got == made.selected() == {0: 10, 1: 10}


def test_service_counts_on_when_a_worker_is_replaced(service: StartService) -> None:
    made = service("-w", "2", "--policy", "round-robin", *binds("tcp4"))
    with pinned(CPUS[0]):
        before = Counter(ask("tcp4")[0] for _ in range(10))
        os.kill(made.workers()[0]["pid"], signal.SIGKILL)
        eventually(lambda: [each["restarts"] for each in made.workers()], [1, 0])
        made.wait_ready()
        after = Counter(ask("tcp4")[0] for _ in range(10))
    assert before == {0: 5, 1: 5}
    assert after == {1: 5, 2: 5}
    assert made.selected() == {2: 5, 1: 10}
    assert made.status()["totals"]["selected"] == 20


def test_service_on_cbpf_when_a_worker_is_replaced(service: StartService) -> None:
    """We hold duplicates of the sockets: one kept too long would go on being chosen."""
    made = service("-w", "2", "--policy", "hash", "--backend", "cbpf", *binds("tcp4", "udp6"))
    os.kill(made.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: [each["restarts"] for each in made.workers()], [1, 0])
    made.wait_ready()
    for kind in ("tcp4", "udp6"):
        assert {ask(kind)[0] for _ in range(40)} == {1, 2}
    # over UDP the anchor, too
    for protocol, host, count in (("tcp", "127.0.0.1", 2), ("udp", "::1", 3)):
        assert len({each.inode for each in port_holders.holders(protocol, host, PORT)}) == count
