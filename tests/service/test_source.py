"""`source`: a client's address keeps its worker."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import IPv6Address

import pytest

from steer.policy.builtin import CBPF, EBPF
from testkit.clients import http_get
from testkit.fixtures import StartService
from testkit.harness import KINDS, PORT, Harness
from testkit.namespaces import Netns
from testkit.processes import eventually

pytestmark = pytest.mark.needs("netns")
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize(
    "backend", [pytest.param(EBPF, marks=pytest.mark.needs("bpf", "migrate")), CBPF]
)
ebpf = pytest.mark.needs("bpf", "migrate")
_V6 = int(IPv6Address("2001:db8::"))


@pytest.fixture(autouse=True)
def addresses(netns: Netns) -> None:
    """All of 127.0.0.0/8 are local anyhow."""
    netns.sysctl("net.ipv6.ip_nonlocal_bind", 1)
    command = ("ip", "-6", "route", "add", "local", "2001:db8::/32", "dev", "lo")
    subprocess.run(command, check=True, timeout=60)


def v4(number: int) -> str:
    """Each in a /24 of its own, at 1 more than its number."""
    return f"127.{number >> 8}.{number & 0xFF}.{number % 250 + 1}"


def v6(number: int, host: int = 1) -> str:
    """Each in a /64 of its own."""
    return str(IPv6Address(_V6 | number << 64 | host))


def addresses_of(kind: str, number: int) -> list[str]:
    return [(v6 if kind.endswith("6") else v4)(each) for each in range(1, number + 1)]


def slots_of(
    harness: Harness, hosts: Sequence[str], bind: int = 0, port: int = 0
) -> dict[str, int]:
    """Where a connection or datagram from each goes."""
    host = "127.0.0.1" if "." in hosts[0] else "::1"
    found = harness.flows([(each, port or 20000 + i) for i, each in enumerate(hosts)], bind, host)
    assert len(found) == len(hosts)
    return {peer.removeprefix("::ffff:"): slot for (peer, _), slot in found.items()}


# ---- what makes a source


@every_kind
@both
def test_an_address_keeps_its_worker(kind: str, backend: str) -> None:
    hosts = addresses_of(kind, 60)
    with Harness(backend, "source", everywhere(kind)).serving() as harness:
        first = slots_of(harness, hosts, port=20000)
        assert all(slots_of(harness, hosts, port=20001 + turn) == first for turn in range(4))
        assert set(first.values()) == {0, 1, 2, 3}


def everywhere(kind: str) -> str:
    return KINDS[kind].replace("127.0.0.1", "0.0.0.0").replace("[::1]", "[::]")


def together(harness: Harness, hosts: Sequence[str]) -> bool:
    """Whether all go to one worker."""
    return len(set(slots_of(harness, hosts).values())) == 1


@both
@pytest.mark.parametrize(
    "prefix4, same, other",
    [
        (32, ["127.0.7.9"] * 1, [f"127.0.7.{at}" for at in range(1, 41)]),
        (24, [f"127.0.7.{at}" for at in range(1, 41)], [f"127.0.{at}.9" for at in range(1, 41)]),
        (12, [f"127.{at}.{at}.1" for at in range(16, 32)], [f"127.{at}.0.1" for at in range(255)]),
        (31, ["127.0.7.8", "127.0.7.9"], [f"127.0.7.{at}" for at in range(1, 41, 2)]),
        (0, [f"127.{at}.{at}.{at}" for at in range(1, 255, 6)], []),
    ],
)
def test_bits_of_an_ipv4_address(
    backend: str, prefix4: int, same: list[str], other: list[str]
) -> None:
    params = [f"prefix4={prefix4}"]
    with Harness(backend, "source", everywhere("tcp4"), params=params).serving() as harness:
        assert together(harness, same)
        assert not other or not together(harness, other)


@both
@pytest.mark.parametrize("prefix6", [128, 127, 96, 65, 64, 63, 56, 38])
def test_bits_of_an_ipv6_address(backend: str, prefix6: int) -> None:
    """What differs behind them is of no matter; the last of them is."""
    last = 1 << 128 - prefix6
    behind = {_V6 | last * 5 | (last - 1) & (0x0123456789ABCDEF << at) for at in range(0, 64, 4)}
    params = [f"prefix6={prefix6}"]
    with Harness(backend, "source", everywhere("tcp6"), params=params).serving() as harness:
        assert together(harness, [str(IPv6Address(each)) for each in behind])
        assert not together(harness, [str(IPv6Address(_V6 | last * at)) for at in range(40)])


@both
def test_by_default(backend: str) -> None:
    """All of an IPv4 address, and the first half of an IPv6 one."""
    with Harness(backend, "source", *map(everywhere, ("tcp4", "tcp6"))).serving() as harness:
        assert not together(harness, [f"127.0.0.{at}" for at in range(1, 41)])
        found = slots_of(harness, [v6(1, host=at << 40) for at in range(1, 41)], bind=1)
        assert len(set(found.values())) == 1
        assert len(set(slots_of(harness, addresses_of("tcp6", 40), bind=1).values())) == 4


@both
def test_whatever_the_bind(backend: str) -> None:
    """TCP, UDP, and IPv4 over a socket of IPv6: an address has one worker."""
    binds = ("0.0.0.0:8080", "udp://0.0.0.0:8080", "[::]:8081", "udp://[::]:8081")
    with Harness(backend, "source", *binds).serving() as harness:
        if backend == EBPF:
            hosts = addresses_of("tcp4", 50)
            first = slots_of(harness, hosts)
            assert all(slots_of(harness, hosts, bind) == first for bind in (1, 2, 3))
        hosts = addresses_of("tcp6", 50)
        assert slots_of(harness, hosts, 2) == slots_of(harness, hosts, 3)


# ---- workers that come and go


@every_kind
@both
def test_only_what_has_to_moves(kind: str, backend: str) -> None:
    hosts = addresses_of(kind, 200)
    with Harness(backend, "source", everywhere(kind), workers=5) as harness:
        harness.join(0, 1, 2, 3)
        harness.steer()
        before = slots_of(harness, hosts)
        harness.steer(0, 1, 3)
        without = slots_of(harness, hosts)
        assert {h: without[h] for h in hosts if before[h] != 2} == {
            h: before[h] for h in hosts if before[h] != 2
        }
        assert 2 not in without.values()
        harness.join(4)
        harness.steer(0, 1, 3, 4)
        more = slots_of(harness, hosts)
        assert {more[h] for h in hosts if more[h] != without[h]} == {4}
        assert 20 <= sum(slot == 4 for slot in more.values()) <= 80


@both
def test_weights(backend: str) -> None:
    """Of 2,000 addresses: 6 standard deviations are allowed."""
    hosts = addresses_of("udp4", 2000)
    with Harness(
        backend, "source", everywhere("udp4"), workers=2, weights=(1, 3)
    ).serving() as harness:
        share = Counter(slots_of(harness, hosts).values())
        assert abs(share[1] - 1500) <= 6 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("kind", ["udp4", "udp6"])
@both
def test_even(kind: str, backend: str) -> None:
    """Addresses that follow one another: 6 standard deviations are allowed."""
    hosts = addresses_of(kind, 2000)
    with Harness(backend, "source", everywhere(kind), workers=4).serving() as harness:
        share = Counter(slots_of(harness, hosts).values())
        assert max(abs(share[slot] - 500) for slot in range(4)) <= 6 * (2000 * 3 / 16) ** 0.5


# ---- queues that move


@ebpf
@pytest.mark.parametrize(
    "bind, hosts", [("0.0.0.0:8080", v4), ("[::]:8080", v6), ("[::]:8080", v4)]
)
def test_what_waits_moves_to_the_worker_of_its_address(bind: str, hosts: object) -> None:
    """To where the client's next connection goes, too."""
    names = [hosts(each) for each in range(1, 61)]  # type: ignore[operator]
    host = "127.0.0.1" if "." in names[0] else "::1"
    with Harness(EBPF, "source", bind, workers=4) as harness, ExitStack() as clients:
        harness.join(0, 1, 2, 3)
        harness.steer(0)
        for name in names:
            clients.enter_context(harness.send(harness.binds[0], (name, 30000), host))
        eventually(harness.selected, {0: len(names)})
        harness.steer(1, 2, 3)
        harness.close_sockets(0)
        moved = {
            each.peer[0].removeprefix("::ffff:"): each.slot for each in harness.take(len(names))
        }
        assert len(set(moved.values())) == 3
        assert slots_of(harness, names) == moved
        assert harness.backend.unsteered() == 0


# ---- services


@ebpf
def test_service(service: StartService) -> None:
    running = service("--policy=source", "-w", "3", "-b", f"127.0.0.1:{PORT}")
    found = {http_get("127.0.0.1", PORT)[1]["slot"] for _ in range(12)}
    assert len(found) == 1
    assert running.status()["params"] == {"prefix4": 32, "prefix6": 64}
    assert "with prefix4=32, prefix6=64" in running.steer("status", running.name).stdout
