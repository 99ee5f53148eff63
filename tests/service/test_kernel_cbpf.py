"""Classic programs on the kernel, which run by its own order of sockets: flow by flow the slot that
is foretold, as sockets come and go. No privilege is needed but to make the namespace."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import ip_network

import msgspec
import pytest

from steer.backends.cbpf import Cbpf
from steer.backends.open import open_backend
from steer.errors import KernelError
from steer.policy import classic
from steer.policy.builtin import CBPF, KERNEL
from steer.policy.layout import Member
from steer.sockets import group_program
from testkit.clients import http_get
from testkit.confine import NOBODY
from testkit.fixtures import StartService
from testkit.harness import CPUS, KINDS, PORT, Harness, pinned, sources

pytestmark = pytest.mark.usefixtures("netns")

all_kinds = pytest.mark.parametrize("kind", KINDS)

OTHER_HOST = "2001:db8:89ab:cdef:123:4567:fedc:ba98"
"""Of which every word counts."""


@pytest.fixture(autouse=True)
def _other_host(netns: object) -> None:
    command = ["ip", "address", "add", f"{OTHER_HOST}/128", "dev", "lo", "nodad"]
    subprocess.run(command, check=True)


def flows_to(kind: str) -> list[tuple[str, int]]:
    """Flows of many addresses and ports, the highest and the lowest among them."""
    hosts = ["::1", OTHER_HOST] if kind.endswith("6") else ["127.0.0.1", "127.254.3.129"]
    ports = (1, 80, 255, 256, 1023, 32767, 32768, 65535)
    return [(host, port) for host in hosts for port in ports] + [
        flow for host in hosts for flow in sources(host, 60)
    ]


def foretold(harness: Harness, flows: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """The slot of each flow, by the layout in force."""
    backend = harness.backend
    assert isinstance(backend, Cbpf)
    assert backend._layout
    entries = backend._layout.entries
    found = {}
    for host, port in flows:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        number = classic.flow_hash(socket.inet_pton(family, host), port, PORT, backend._seed)
        found[host, port] = entries[number % len(entries)]
    return found


@all_kinds
def test_hash_goes_where_foretold(kind: str) -> None:
    flows = flows_to(kind)
    with Harness(CBPF, "hash", kind, workers=5, weights=[1, 3, 1, 1, 2]).serving() as harness:
        assert foretold(harness, flows) == harness.flows(flows)
        assert len(set(foretold(harness, flows).values())) == 5


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_hash_of_ipv4_on_an_ipv6_wildcard_goes_where_foretold(scheme: str) -> None:
    with Harness(CBPF, "hash", f"{scheme}://[::]:{PORT}").serving() as harness:
        flows = flows_to("tcp4")
        expected = {
            (f"::ffff:{host}", port): slot
            for (host, port), slot in foretold(harness, flows).items()
        }
        assert harness.flows(flows, host="127.0.0.1") == expected
        flows = flows_to("tcp6")
        assert harness.flows(flows, host="::1") == foretold(harness, flows)


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_hash_behind_ip_options_goes_where_foretold(scheme: str) -> None:
    """They move the ports."""
    with Harness(CBPF, "hash", f"{scheme}://127.0.0.1:{PORT}").serving() as harness:
        flows = sources("127.0.0.1", 60)
        for flow in flows:
            kind = socket.SOCK_DGRAM if scheme == "udp" else socket.SOCK_STREAM
            with socket.socket(socket.AF_INET, kind) as client:
                client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01" * 8)
                client.bind(flow)
                client.connect(("127.0.0.1", PORT))
                if scheme == "udp":
                    client.send(b"x")
                [taken] = harness.take(1)
            assert {flow: taken.slot} == foretold(harness, [flow])


def source_foretold(harness: Harness, hosts: Iterable[str]) -> dict[str, int]:
    """The slot of each client, by the layout in force."""
    backend = harness.backend
    assert isinstance(backend, Cbpf)
    assert backend._layout
    entries = backend._layout.entries
    prefix4, prefix6 = harness.plan.params
    found = {}
    for host in hosts:
        bits = prefix6 if ":" in host else prefix4
        address = ip_network((host, bits), strict=False).network_address.packed
        # Its last word stands where ports do in a flow.
        *_, high, low = struct.unpack(f">{len(address) // 2}H", address)
        number = classic.flow_hash(address[:-4], high, low, backend._seed)
        found[host] = entries[number % len(entries)]
    return found


def hosts_of(kind: str) -> list[str]:
    return ["::1", OTHER_HOST] if kind.endswith("6") else [f"127.{n}.{n}.{n}" for n in range(1, 41)]


@all_kinds
@pytest.mark.parametrize("prefixes", [(32, 64), (20, 128), (9, 1)])
def test_source_goes_where_foretold(kind: str, prefixes: tuple[int, int]) -> None:
    """Whatever the port."""
    params = [f"prefix4={prefixes[0]}", f"prefix6={prefixes[1]}"]
    hosts = hosts_of(kind)
    with Harness(
        CBPF, "source", kind, workers=5, weights=[1, 3], params=params
    ).serving() as harness:
        expected = source_foretold(harness, hosts)
        for port in (1, 8079, 32768, 65535):
            got = harness.flows([(host, port) for host in hosts])
            assert {host: slot for (host, _), slot in got.items()} == expected


@all_kinds
def test_an_address_keeps_its_worker_while_others_come_and_go(kind: str) -> None:
    chance = random.Random(kind)
    hosts = hosts_of(kind)
    with Harness(CBPF, "source", kind, workers=6).serving() as harness:
        following, before = 6, source_foretold(harness, hosts)
        for _ in range(20):
            gone = None
            if chance.random() < 0.5 and len(harness.sockets) > 2:
                gone = chance.choice(sorted(harness.sockets))
                harness.leave(gone)
            else:
                harness.join(following)
                following += 1
            harness.steer()
            got = {host: slot for (host, _), slot in harness.flows([(h, 0) for h in hosts]).items()}
            assert got == source_foretold(harness, hosts)
            if gone is not None:
                # Only what was at the one that has gone has moved.
                kept = {host for host in hosts if before[host] != gone}
                assert {host: got[host] for host in kept} == {host: before[host] for host in kept}
            before = got


@all_kinds
@pytest.mark.parametrize("gone", [[0], [2], [4], [1, 3], [4, 0], [0, 4, 1, 3]], ids=str)
def test_last_socket_moves_into_the_hole(kind: str, gone: list[int]) -> None:
    """Nobody is told of a change in the table: those who stay keep their flows."""
    flows = sources("::1" if kind.endswith("6") else "127.0.0.1", 100)
    with Harness(CBPF, "hash", kind, workers=5).serving() as harness:
        harness.leave(*gone)
        expected = foretold(harness, flows)
        got = harness.flows(flows)
        stay = {flow for flow, slot in expected.items() if slot not in gone}
        assert {flow: got[flow] for flow in stay} == {flow: expected[flow] for flow in stay}
        assert not set(got.values()) & set(gone)


@all_kinds
def test_order_is_known_after_many_changes(kind: str) -> None:
    chance = random.Random(kind)
    flows = sources("::1" if kind.endswith("6") else "127.0.0.1", 60)
    with Harness(CBPF, "hash", kind, workers=6).serving() as harness:
        following = 6
        for _ in range(25):
            if chance.random() < 0.5 and len(harness.sockets) > 2:
                harness.leave(chance.choice(sorted(harness.sockets)))
            else:
                harness.join(following)
                following += 1
            harness.steer()
            assert harness.flows(flows) == foretold(harness, flows)


@all_kinds
def test_32_sockets_in_reverse(kind: str) -> None:
    flows = sources("::1" if kind.endswith("6") else "127.0.0.1", 300)
    with Harness(CBPF, "hash", kind, workers=32) as harness:
        harness.join(*reversed(range(32)))
        harness.steer()
        assert harness.flows(flows) == foretold(harness, flows)


def test_each_group_has_its_own_order() -> None:
    """Groups that a socket joined in different order would be steered apart."""
    with Harness(CBPF, "hash", *KINDS, workers=4).serving() as harness:
        harness.leave(1)
        harness.join(9)
        harness.steer()
        for bind, kind in enumerate(KINDS):
            flows = sources("::1" if kind.endswith("6") else "127.0.0.1", 60)
            assert harness.flows(flows, bind) == foretold(harness, flows)


@all_kinds
def test_newcomer_is_not_chosen_before_it_is_ready(kind: str) -> None:
    with Harness(CBPF, "cpu", kind, workers=len(CPUS)).serving() as harness:
        for late in (70, 71):
            harness.join(late)
            for spec in harness.plan.specs:
                with pinned(spec.cpu):
                    assert harness.count(20) == {spec.number: 20}


UDP = pytest.mark.parametrize("kind", ["udp4", "udp6"])


@UDP
def test_the_only_one_that_is_chosen_gets_all_while_others_leave(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each change of the program: between a departure and that change, too. The kernel's
    hash would choose what holds the group together, and nobody reads that."""
    with Harness(CBPF, "hash", kind, workers=3) as harness:
        harness.backend.open_anchors()
        assert harness.backend.anchors
        harness.serving()
        attach, looks = group_program.attach_cbpf, 0

        def look_and_attach(fd: int, program: Sequence[classic.Insn]) -> None:
            nonlocal looks
            looks += 1
            assert harness.count(30) == {max(harness.sockets): 30}
            attach(fd, program)

        for newcomer in range(3, 9):
            harness.join(newcomer)
            harness.steer(newcomer)
            with monkeypatch.context() as patch:
                patch.setattr(group_program, "attach_cbpf", look_and_attach)
                harness.leave(*(slot for slot in list(harness.sockets) if slot != newcomer))
            assert harness.count(30) == {newcomer: 30}
        assert looks
        assert len(harness.backend.controller_sockets) <= 2, "a filler goes when somebody comes"


@UDP
def test_another_controller_goes_on_where_a_filler_is(kind: str) -> None:
    with Harness(CBPF, "hash", kind, workers=2) as harness:
        harness.backend.open_anchors()
        harness.serving()
        harness.steer(1)
        harness.leave(0)
        saved, fds = harness.backend.stored()
        value = msgspec.json.decode(msgspec.json.encode(saved))
        assert value["order"]["filled"]
        old, harness.backend = harness.backend, open_backend(CBPF, harness.plan, empty=True)
        held = {1: [os.dup(fd) for fd in old.held(1)]}
        harness.backend.restore(value, [os.dup(fd) for fd in fds], held)
        harness.steer(1)
        assert harness.count(30) == {1: 30}
        harness.join(7)
        harness.steer(7)
        harness.leave(1)
        assert harness.count(30) == {7: 30}
        old.close()


@all_kinds
def test_another_controller_finds_the_order_while_some_leave_one_after_the_other(kind: str) -> None:
    """By what the guard was told before the first of them, see `Rotation.together`."""
    with Harness(CBPF, "hash", kind, workers=7).serving() as harness:
        value = msgspec.json.decode(msgspec.json.encode(harness.backend.stored()[0]))
        for slot in (0, 1, 4):
            harness.leave(slot)
            held = {at: list(map(os.dup, harness.backend.held(at))) for at in harness.sockets}
            adopter = open_backend(CBPF, harness.plan, empty=True)
            adopter.restore(value, (), held)
            for chosen in harness.sockets:
                adopter.steer([Member(chosen)])
                assert harness.count(5) == {chosen: 5}
            adopter.close()


@all_kinds
def test_by_chance_all_of_32_are_found(kind: str) -> None:
    with Harness(CBPF, "random", kind, workers=32) as harness:
        harness.join(*random.Random(0).sample(range(32), 32))
        harness.steer()
        harness.leave(5, 31, 0)
        harness.steer()
        got = harness.count(1500)
        assert set(got) == set(range(32)) - {0, 5, 31}


@pytest.mark.parametrize("policy", ["cpu", "hash", "source", "random"])
def test_many_workers(policy: str) -> None:
    """As long as programs get, on this kernel; one worker more than fits is refused."""
    with Harness(CBPF, policy, "udp4", workers=classic.HASH_LENGTH).serving() as harness:
        got = harness.flows(sources("127.0.0.1", 20) + [(f"127.0.{n}.9", 0) for n in range(250)])
        assert len(set(got.values())) > (1 if policy == "cpu" else 100)
    with pytest.raises(KernelError, match="room for 768 workers"):
        Harness(CBPF, policy, "udp4", workers=classic.HASH_LENGTH + 1)


@pytest.mark.parametrize(
    "policy, why",
    [
        ("round-robin", "classic BPF keeps no state, so it cannot take turns"),
        ("least-conn", "classic BPF cannot read the counts of connections"),
        ("flow", "classic BPF keeps no state, so it cannot remember flows"),
    ],
)
def test_what_classic_bpf_cannot_is_left_to_the_kernel(
    service: StartService, policy: str, why: str
) -> None:
    made = service("-w", "2", "--policy", policy, "--backend", "cbpf")
    status = made.status()
    assert status["backend"] == KERNEL
    assert why in status["backend_reason"]
    assert why in made.log


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("policy", ["cpu", "hash", "source", "random"])
def test_without_privilege(service: StartService, policy: str) -> None:
    workers = 2 * len(CPUS)
    made = service("-w", str(workers), "--policy", policy, user=NOBODY)
    cpus_of = {each["slot"]: each["cpus"] for each in made.workers()}
    answers: Counter[int] = Counter()
    for cpu in CPUS:
        with pinned(cpu):
            hosts = (f"127.0.{cpu}.{number}" for number in range(1, 41))
            slots = [http_get("127.0.0.1", PORT, source=host)[1]["slot"] for host in hosts]
        answers.update(slots)
        if policy == "cpu":
            assert {cpus_of[slot][0] for slot in slots} == {cpu}
    assert set(answers) == set(cpus_of)
    status = made.status()
    assert status["backend"] == CBPF
    assert "CAP_BPF: run as root" in status["backend_reason"]
    said = " ".join(status["notes"])
    assert ("at random" in said) == (policy == "cpu")
    assert "connections queued at a worker that crashes or hangs are lost" in said
    assert status["totals"]["selected"] is None
