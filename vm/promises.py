"""What a policy promises, seen with real connections: exactly, wherever the kernel is exact."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import msgspec

from bench.machine import pinned
from steer.control.schema import Service, Worker
from steer.policy.builtin import KERNEL

OWN = "own"
"""What is promised of the template for policies of one's own."""
HOST, PORT = "127.0.0.1", 8080
_TIMEOUT_S = 30.0
_LOOK_AGAIN_S = 0.05
_FLOWS, _MOST_FLOWS = 8, 64
"""As many as there have to be; as many more as it takes for two workers to have some."""
_PORTS = range(20000, 20000 + _MOST_FLOWS)
_TO_ALL = 25
"""Times as many connections as workers: of 8 one gets none once in 50 billion times."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of socket(7): closed at once, so that the four-tuple may be used again at once."""
_REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


_Place = TypeVar("_Place")


class Broken(Exception):
    """A promise that was not kept."""


class Answer(msgspec.Struct):
    """Who answered, and the CPU it was on."""

    slot: int
    cpu: int


class Clients:
    """Those of one service, on the machine's own loopback.

    Args:
        status: what the service says of itself now.
        cpus: that clients may be on, of which the first is theirs unless it matters.

    Attributes:
        asked: connections made, and datagrams sent.
    """

    def __init__(self, status: Callable[[], Service], cpus: Sequence[int]) -> None:
        self.status = status
        self.cpus = cpus
        self.workers: Mapping[int, Worker] = {each.slot: each for each in status().workers}
        self.asked = 0

    def ask(self, host: str = "", port: int = 0) -> int:
        """The slot that a connection of its own from there goes to."""
        return self.answer(host, port).slot

    def answer(self, host: str = "", port: int = 0) -> Answer:
        with self.connect(host, port) as sock, self._told():
            return _answer(sock)

    def connect(self, host: str = "", port: int = 0) -> socket.socket:
        """A connection with a request sent."""
        self.asked += 1
        with self._told():
            sock = socket.create_connection((HOST, PORT), _TIMEOUT_S, (host, port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.sendall(_REQUEST)
        return sock

    def send(self, port: int) -> int:
        """The slot that a datagram from there goes to."""
        self.asked += 1
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, self._told():
            sock.settimeout(_TIMEOUT_S)
            sock.bind((HOST, port))
            sock.connect((HOST, PORT))
            sock.send(b"x")
            return msgspec.json.decode(sock.recv(65536), type=Answer).slot

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Which one it was that got no answer, or none that can be read."""
        try:
            yield
        except (OSError, msgspec.DecodeError) as error:
            cpus = sorted(os.sched_getaffinity(0))
            raise Broken(f"request {self.asked}, from CPUs {cpus}: {error}") from error


def _answer(sock: socket.socket) -> Answer:
    length = 0
    with sock.makefile("rb") as stream:
        while line := stream.readline().strip():
            name, _, value = line.partition(b":")
            if name == b"Content-Length":
                length = int(value)
        return msgspec.json.decode(stream.read(length), type=Answer)


def _hold(is_kept: bool, otherwise: str) -> None:
    if not is_kept:
        raise Broken(otherwise)


# ---- the promises: each returns what was seen, or raises Broken


def own_cpu(clients: Clients) -> str:
    """The worker of the CPU that a client is on."""
    for cpu in [*clients.cpus, *clients.cpus]:
        with pinned(cpu):
            got = clients.answer()
        of_worker = clients.workers[got.slot].cpus
        _hold(of_worker == [cpu] == [got.cpu], f"from CPU {cpu} to slot {got.slot}, {of_worker}")
    return f"on {len(clients.cpus)} CPUs"


def in_turn(clients: Clients) -> str:
    """From one CPU, each as often as any other."""
    got = Counter(clients.ask() for _ in range(2 * len(clients.workers)))
    _hold(got == dict.fromkeys(clients.workers, 2), f"not in turn: {_shares(got)}")
    return f"each of {len(got)} its turn"


def fewest_open(clients: Clients) -> str:
    """Those that stay go to a worker each; the next to the one that has lost its own."""
    with ExitStack() as stack:
        held: dict[int, socket.socket] = {}
        for _ in clients.workers:
            sock = stack.enter_context(clients.connect())
            held[_answer(sock).slot] = sock
        _hold(held.keys() == clients.workers.keys(), f"{len(held)} got all that stay")
        seen = f"{len(held)} connections that stay to as many workers"
        if _open(clients, 0) is None:
            return seen
        free = max(held)
        held[free].close()
        _wait_closed(clients, free)
        got = clients.ask()
        _hold(got == free, f"to slot {got}, where slot {free} has nothing open")
    return f"{seen}, the next to the free one"


def by_flow(clients: Clients) -> str:
    """Again to the same worker, when a four-tuple comes again."""
    return _same_again(lambda port: clients.ask(port=port), _PORTS, "flows")


def by_source(clients: Clients) -> str:
    """To the same worker from the same address, whatever the port."""
    hosts = [f"127.{number}.{number}.{number}" for number in range(1, _MOST_FLOWS + 1)]
    return _same_again(clients.ask, hosts, "addresses")


def by_datagram(clients: Clients) -> str:
    """As by flow, over UDP, where each datagram is chosen for."""
    return _same_again(clients.send, _PORTS, "flows")


def remembered(clients: Clients) -> str:
    """Also that the program knew the flow."""
    seen = by_datagram(clients)
    counted = clients.status().counters
    _hold(counted["new"] == counted["known"] == clients.asked / 2, f"it counts {counted}")
    return f"{seen}, all remembered"


def to_all(clients: Clients) -> str:
    """To each sooner or later."""
    got: Counter[int] = Counter()
    while len(got) < len(clients.workers):
        _hold(got.total() < _TO_ALL * len(clients.workers), f"not to all: {_shares(got)}")
        got[clients.ask()] += 1
    return f"{len(got)} workers found by {got.total()} connections"


def by_template(clients: Clients) -> str:
    """By chance, as its parameter is set to do with all; and what it counts and measures."""
    seen = to_all(clients)
    status = clients.status()
    counted = status.counters["scattered"]
    recorded = sum(count for _, count in status.histograms["length"].buckets)
    _hold(counted == recorded == clients.asked, f"counted {counted}, measured {recorded}")
    return f"{seen}, all counted and measured"


_OF: Mapping[str, Callable[[Clients], str]] = {
    "cpu": own_cpu,
    "round-robin": in_turn,
    "least-conn": fewest_open,
    "hash": by_flow,
    "source": by_source,
    "flow": remembered,
    "random": to_all,
    OWN: by_template,
}
DATAGRAMS = ("flow",)
"""Policies that mean something over UDP only."""


def check(policy: str, backend: str, clients: Clients) -> str:
    """See that a service keeps what the policy promises on the backend that it stands on.

    The kernel's own choice is by its own hash of the four-tuple, whatever was asked for.

    Returns:
        What was seen.

    Raises:
        Broken: it does not.
    """
    by_kernel = by_datagram if policy in DATAGRAMS else by_flow
    # From one CPU: so nothing overtakes what was sent before it.
    with pinned(clients.cpus[0]):
        return (by_kernel if backend == KERNEL else _OF[policy])(clients)


def _same_again(ask: Callable[[_Place], int], places: Iterable[_Place], called: str) -> str:
    """Ask from one place after the other, then from all of them again."""
    first: dict[_Place, int] = {}
    for place in places:
        first[place] = ask(place)
        workers = len(set(first.values()))
        if workers > 1 and len(first) >= _FLOWS:
            break
    _hold(workers > 1, f"all {len(first)} {called} to one worker")
    moved = sum(ask(place) != slot for place, slot in first.items())
    _hold(not moved, f"{moved} of {len(first)} {called} did not go where they went before")
    return f"{len(first)} {called} to {workers} workers, and there again"


def _open(clients: Clients, slot: int) -> int | None:
    return next(each.connections.open for each in clients.status().workers if each.slot == slot)


def _wait_closed(clients: Clients, slot: int) -> None:
    end_s = time.monotonic() + _TIMEOUT_S
    while count := _open(clients, slot):
        _hold(time.monotonic() < end_s, f"slot {slot} has {count} open after all were closed")
        time.sleep(_LOOK_AGAIN_S)


def _shares(got: Mapping[int, int]) -> str:
    return ", ".join(f"slot {slot} {count}" for slot, count in sorted(got.items()))
