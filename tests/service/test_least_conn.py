"""`least-conn`: how many connections each worker has open, to the one, and who gets the next."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from steer import abi
from steer.loader import libbpf
from steer.policy.builtin import EBPF
from testkit.clients import freeze, is_answered, request, send
from testkit.fixtures import StartService
from testkit.harness import CPUS, PORT, Harness, pinned
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually
from testkit.service import STEER, Service, launch

pytestmark = [pytest.mark.needs("bpf", "migrate", "netns"), pytest.mark.usefixtures("netns")]
tcp = pytest.mark.parametrize("kind", ["tcp4", "tcp6"])
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_RETURN_0 = struct.pack("HBBI", 6, 0, 0, 0)
"""Classic BPF: keep nothing."""
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27


@dataclass(frozen=True)
class Held:
    """A connection: the client's end, and that of the worker in `slot`."""

    slot: int
    client: socket.socket
    server: socket.socket

    def close(self) -> None:
        self.server.close()
        self.client.close()


class Holder:
    """Connections that stay open."""

    def __init__(self, harness: Harness, clients: ExitStack) -> None:
        self.harness = harness
        self._clients = clients

    def connect(self, bind: int = 0) -> socket.socket:
        """That waits in somebody's queue."""
        at = self.harness.binds[bind]
        return self._clients.enter_context(socket.create_connection((at.address, at.port), 60))

    def hold(self, number: int = 1, bind: int = 0) -> list[Held]:
        """One after the other, each accepted before the next."""
        return [self.accept(self.connect(bind), bind) for _ in range(number)]

    def accept(self, client: socket.socket, bind: int = 0) -> Held:
        """At whichever listener it is; there is no other."""
        slot, server = eventually(lambda: next(self.accept_all(bind), None))
        assert server.getpeername() == client.getsockname()
        return Held(slot, client, server)

    def accept_all(self, bind: int = 0) -> Iterator[tuple[int, socket.socket]]:
        """Whatever waits."""
        for slot, socks in self.harness.sockets.items():
            with suppress(BlockingIOError):
                while True:
                    server, _ = socks[bind].accept()
                    yield slot, self._clients.enter_context(server)

    def open(self) -> dict[int, int | None]:
        """By slot; slots with nothing left out."""
        found = {slot: self.harness.backend.open(slot) for slot in range(self.harness.plan.slots)}
        return {slot: number for slot, number in found.items() if number != 0}


def holder(
    clients: ExitStack, *kinds: str, workers: int = 4, weights: Sequence[int] = ()
) -> Holder:
    """Of a harness whose workers serve."""
    harness = Harness(EBPF, "least-conn", *kinds, workers=workers, weights=weights)
    return Holder(clients.enter_context(harness).serving(), clients)


def by_slot(held: Sequence[Held]) -> Counter[int]:
    return Counter(each.slot for each in held)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    sock.close()


# ---- what is counted


@tcp
def test_open_from_the_handshake_until_the_worker_closes(clients: ExitStack, kind: str) -> None:
    at = holder(clients, kind, workers=1)
    waiting = [at.connect() for _ in range(3)]
    eventually(at.open, {0: 3})
    held = [at.accept(client) for client in waiting]
    assert at.open() == {0: 3}

    held[0].client.shutdown(socket.SHUT_WR)
    assert held[0].server.recv(1) == b""
    assert at.open() == {0: 3}, "the worker may still answer"
    held[0].server.close()
    assert at.open() == {0: 2}
    held[1].server.close()
    assert at.open() == {0: 1}, "the client's end does not matter"
    held[2].close()
    assert at.open() == {}


@tcp
def test_closed_once_however_often(clients: ExitStack, kind: str) -> None:
    at = holder(clients, kind, workers=1)
    kept, first, second = at.hold(3)
    first.server.shutdown(socket.SHUT_WR)
    assert at.open() == {0: 2}
    first.client.close()
    first.server.close()
    second.client.shutdown(socket.SHUT_WR)
    second.server.shutdown(socket.SHUT_RDWR)
    second.close()
    assert at.open() == {0: 1}
    kept.close()
    at.hold()
    assert at.open() == {0: 1}, "less than none"


@tcp
def test_reset(clients: ExitStack, kind: str) -> None:
    """By the client, by the worker, and while it is in the queue."""
    at = holder(clients, kind, workers=1)
    kept, by_client, by_worker = at.hold(3)
    queued = at.connect()
    eventually(at.open, {0: 4})
    reset(by_client.client)
    eventually(at.open, {0: 3})
    reset(by_worker.server)
    eventually(at.open, {0: 2})
    reset(queued)
    eventually(at.open, {0: 1})
    kept.close()
    assert at.open() == {}


@tcp
def test_with_syn_cookies(netns: Netns, clients: ExitStack, kind: str) -> None:
    """The program runs twice, the connection opens once."""
    netns.sysctl("net.ipv4.tcp_syncookies", 2)
    at = holder(clients, kind)
    held = at.hold(40)
    assert at.open() == by_slot(held) == dict.fromkeys(range(4), 10)
    for each in held:
        each.close()
    assert at.open() == {}


@contextmanager
def deaf(sock: socket.socket) -> Iterator[None]:
    """Whatever comes for it is lost, as on a bad line (socket(7), SO_ATTACH_FILTER)."""
    insn = ctypes.create_string_buffer(_RETURN_0)
    fprog = struct.pack("HP", 1, ctypes.addressof(insn))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
    yield
    sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def half_open(at: Holder, clients: ExitStack, until: ExitStack | None = None) -> socket.socket:
    """A connection whose handshake has begun and does not end `until` then."""
    address = at.harness.binds[0].address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    client = clients.enter_context(socket.socket(family))
    client.setblocking(False)
    (until or clients).enter_context(deaf(client))
    with suppress(BlockingIOError):
        client.connect((address, PORT))
    return client


FASTOPEN = 0x1 | 0x2 | 0x4 | 0x200 | 0x400
"""net.ipv4.tcp_fastopen: at both ends, without cookies, for all listeners."""


def fast_open(at: Holder, client: socket.socket) -> None:
    """Data comes with its SYN."""
    with suppress(BlockingIOError):
        client.sendto(b"early", socket.MSG_FASTOPEN, (at.harness.binds[0].address, PORT))


def test_with_fast_open(netns: Netns, clients: ExitStack) -> None:
    """Open before the handshake has ended, and once only."""
    netns.sysctl("net.ipv4.tcp_fastopen", FASTOPEN)
    at = holder(clients, "tcp4", workers=1)
    early, other = (clients.enter_context(socket.socket()) for _ in range(2))
    fast_open(at, early)
    held = at.accept(early)
    assert held.server.recv(10) == b"early"
    assert at.open() == {0: 1}
    other.setblocking(False)
    with deaf(other):
        fast_open(at, other)
        eventually(at.open, {0: 2})
        moved = at.accept(other)
    moved.close()
    held.close()
    eventually(at.open, {})


# ---- where it is counted


def moved_left(at: Holder) -> bool:
    """Whether it is still known of any connection that it was moved."""
    counting = at.harness.backend.counting  # type: ignore[attr-defined]
    key = ctypes.create_string_buffer(8)
    is_any = libbpf.libbpf().bpf_map_get_next_key(counting._moved.fileno(), None, key) == 0
    *_, number = abi.PACE.unpack_from(counting.slots._memory, abi.LOAD_BYTES - abi.PACE.size)
    assert is_any == (number > 0), "where it is 0 nobody looks"
    return is_any


def queue(at: Holder, slot: int, number: int) -> list[socket.socket]:
    """Connections that wait at `slot`."""
    at.harness.steer(slot)
    before = at.harness.backend.open(slot) or 0
    waiting = [at.connect() for _ in range(number)]
    eventually(lambda: at.harness.backend.open(slot), before + number)
    return waiting


def migrate_queue(at: Holder, slot: int) -> None:
    """What waits there goes to others; it is no member."""
    at.harness.backend.migrate_queue(slot, dict(enumerate(at.harness.sockets[slot])))


@tcp
def test_moved_when_a_listener_is_closed(clients: ExitStack, kind: str) -> None:
    """What waits is counted where it goes; what was accepted stays with its worker."""
    at = holder(clients, kind, workers=3)
    at.harness.steer(0)
    (kept,) = at.hold()
    queue(at, 0, 30)
    at.harness.steer(1, 2)
    at.harness.close_sockets(0)
    opened = at.open()
    assert opened.pop(0) == 1
    accepted = list(at.accept_all())
    assert len(accepted) == 30
    assert Counter(slot for slot, _ in accepted) == opened
    for sock in [kept.server, *(sock for _, sock in accepted)]:
        sock.close()
    assert at.open() == {}
    assert not moved_left(at)


@tcp
def test_moved_to_and_fro(clients: ExitStack, kind: str) -> None:
    at = holder(clients, kind, workers=2)
    waiting = queue(at, 0, 5)
    for here, there in [(0, 1), (1, 0), (0, 1)]:
        at.harness.steer(there)
        migrate_queue(at, here)
        assert at.open() == {there: 5}
        assert moved_left(at)
    reset(waiting.pop())
    eventually(at.open, {1: 4})
    for client in waiting:
        at.accept(client).close()
    assert at.open() == {}
    assert not moved_left(at)


def test_moved_before_its_handshake_has_ended(clients: ExitStack) -> None:
    """It is counted where it is accepted."""
    at = holder(clients, "tcp4", workers=2)
    at.harness.steer(0)
    with ExitStack() as until:
        client = half_open(at, clients, until)
        eventually(at.harness.selected, {0: 1})
        at.harness.steer(1)
        at.harness.close_sockets(0)
        assert at.open() == {}
    held = at.accept(client)
    assert held.slot == 1
    assert at.open() == {1: 1}
    held.close()
    assert at.open() == {}
    assert not moved_left(at)


def test_fast_open_that_is_moved(netns: Netns, clients: ExitStack) -> None:
    netns.sysctl("net.ipv4.tcp_fastopen", FASTOPEN)
    at = holder(clients, "tcp4", workers=2)
    at.harness.steer(0)
    client = clients.enter_context(socket.socket())
    client.setblocking(False)
    with deaf(client):
        fast_open(at, client)
        eventually(at.open, {0: 1})
        at.harness.steer(1)
        at.harness.close_sockets(0)
        assert at.open() == {1: 1}
        held = at.accept(client)
    held.close()
    eventually(at.open, {})
    assert not moved_left(at)


@tcp
def test_with_nobody_left_it_is_reset(clients: ExitStack, kind: str) -> None:
    at = holder(clients, kind, workers=1)
    queue(at, 0, 5)
    at.harness.close_sockets(0)
    assert at.open() == {}
    assert not moved_left(at)


@pytest.mark.parametrize("retired", [True, False])
def test_what_a_worker_leaves_open_is_not_counted_for_the_next(
    clients: ExitStack, retired: bool
) -> None:
    """A child of one that died may go on with its connections."""
    at = holder(clients, "tcp4", workers=2)
    at.harness.steer(0)
    old = at.hold(3)
    at.harness.leave(0)
    if retired:
        at.harness.backend.take_counts(0)
    at.harness.join(0)
    at.harness.steer(0, 1)
    assert at.open() == {}
    for each in old[:2]:
        each.close()
    assert by_slot(at.hold(4)) == {0: 2, 1: 2}
    old[2].close()
    assert at.open() == {0: 2, 1: 2}


def test_all_binds_together(clients: ExitStack) -> None:
    at = holder(clients, "tcp4", "tcp6", workers=3)
    first = at.hold(3, bind=0)
    second = at.hold(3, bind=1)
    assert by_slot(first) == by_slot(second) == {0: 1, 1: 1, 2: 1}
    assert at.open() == {0: 2, 1: 2, 2: 2}
    for each in first:
        if each.slot == 1:
            each.close()
    assert [each.slot for each in at.hold(bind=1)] == [1]


# ---- who gets the next


@tcp
@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_the_one_with_the_fewest(clients: ExitStack, kind: str, workers: int) -> None:
    at = holder(clients, kind, workers=workers)
    held = at.hold(4 * workers)
    assert by_slot(held) == dict.fromkeys(range(workers), 4)
    gone = [each for each in held if each.slot in (0, workers - 1)]
    for each in gone:
        each.close()
    assert by_slot(at.hold(len(gone))) == by_slot(gone)


@tcp
def test_light_load_goes_round(clients: ExitStack, kind: str) -> None:
    """Each CPU takes its own turns."""
    at = holder(clients, kind, workers=4)
    for cpu in CPUS:
        with pinned(cpu):
            slots = at.harness.sequence(40)
            assert slots == [(slots[0] + turn) % 4 for turn in range(40)]


def test_light_load_is_even(clients: ExitStack) -> None:
    """While one is busy the others share, to the one."""
    at = holder(clients, "tcp4", workers=4)
    at.harness.steer(2)
    at.hold()
    at.harness.steer()
    with pinned(CPUS[0]):
        assert Counter(at.harness.sequence(300)) == {0: 100, 1: 100, 3: 100}


@pytest.mark.parametrize("weights", [(3, 1), (1, 2, 5), (7, 7), (1, 100)])
def test_by_weight(clients: ExitStack, weights: tuple[int, ...]) -> None:
    at = holder(clients, "tcp4", workers=len(weights), weights=weights)
    at.hold(int(4 * sum(weights) / min(weights)))
    least = min(weights)
    assert at.open() == {slot: 4 * weight / least for slot, weight in enumerate(weights)}


@tcp
def test_handshakes_that_do_not_end(clients: ExitStack, kind: str) -> None:
    """A burst does not all go to the one that had the fewest when it began.

    What is known of them is halved after a second, which may be in between.
    """
    at = holder(clients, kind, workers=2)
    at.harness.steer(0)
    at.hold(10)
    at.harness.steer(0, 1)
    for _ in range(30):
        half_open(at, clients)
    eventually(lambda: sum(at.harness.selected().values()), 40)
    assert at.open() == {0: 10}
    assert 15 <= at.harness.selected()[0] <= 25


def test_handshakes_that_did_not_end_are_forgotten(clients: ExitStack) -> None:
    """After two seconds at most: nobody keeps others from a worker for longer."""
    at = holder(clients, "tcp4", workers=2)
    at.harness.steer(0)
    for _ in range(10):
        half_open(at, clients)
    at.harness.steer(0, 1)
    assert at.harness.sequence(4) == [1, 1, 1, 1]
    eventually(lambda: 0 in at.harness.sequence(2))


@pytest.mark.parametrize("workers, each", [(65, 10), (100, 10), (1000, 3)])
def test_one_of_many(clients: ExitStack, workers: int, each: int) -> None:
    """Those that are looked at are few, and yet nobody gets much more than others: in 1,500
    runs of a simulation one more at the most, and two or three if half as many were."""
    at = holder(clients, "tcp4", workers=workers)
    for _ in range(each * workers):
        at.connect()
    eventually(lambda: sum(number or 0 for number in at.open().values()), each * workers)
    assert max(number or 0 for number in at.open().values()) == each + 1


def test_one_of_many_that_hangs(clients: ExitStack) -> None:
    at = holder(clients, "tcp4", workers=100)
    queue(at, 50, 5)
    at.harness.steer()
    for _ in range(300):
        at.connect()
    eventually(lambda: sum(number or 0 for number in at.open().values()), 305)
    assert at.open()[50] == 5


def test_datagrams_go_in_turn() -> None:
    with Harness(EBPF, "least-conn", "udp4").serving() as harness, pinned(CPUS[0]):
        slots = harness.sequence(16)
        assert slots == [(slots[0] + turn) % 4 for turn in range(16)]
        assert "only TCP connections are counted" in " ".join(harness.backend.notes)


# ---- services


class Client:
    """A connection to a service that is kept alive."""

    def __init__(self, clients: ExitStack) -> None:
        self.sock = clients.enter_context(socket.create_connection(("127.0.0.1", PORT), DEADLINE_S))
        self._answers = clients.enter_context(self.sock.makefile("rb"))

    def ask(self, target: str = "/") -> int:
        """The slot that answers."""
        self.sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        length = 0
        while (line := self._answers.readline().lower()) != b"\r\n":
            assert line, "closed"
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        found: dict[str, int] = json.loads(self._answers.read(length))
        return found["slot"]


def kept_alive(clients: ExitStack, number: int) -> list[int]:
    """The slots that so many connections went to."""
    return [Client(clients).ask() for _ in range(number)]


def open_at(running: Service) -> dict[int, int | None]:
    return {each["slot"]: each["connections"]["open"] for each in running.workers()}


def is_idle(running: Service) -> bool:
    return set(open_at(running).values()) == {0}


OPTIONS = ("--policy=least-conn", "--hang-timeout=0")


def test_status_says_what_is_open(service: StartService) -> None:
    running = service(*OPTIONS, "-w", "3")
    assert running.status()["notes"] == []
    with ExitStack() as held:
        assert Counter(kept_alive(held, 6)) == {0: 2, 1: 2, 2: 2}
        assert open_at(running) == {0: 2, 1: 2, 2: 2}
        table = running.steer("status", running.name).stdout.splitlines()[1:]
        column = table[0].split().index("open")
        assert [line.split()[column] for line in table[1:4]] == ["2", "2", "2"]
    eventually(lambda: is_idle(running))


@pytest.fixture
def moved(cgroup: Path) -> Iterator[Sequence[Path]]:
    """Three cgroups to be in one after the other, the last in the second; we are in the first."""
    places = (cgroup / "first", cgroup / "second", cgroup / "second" / "below")
    for place in places:
        place.mkdir()
    (places[0] / "cgroup.procs").write_text(str(os.getpid()))
    yield places
    for place in reversed(places):
        for pid in (place / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (cgroup.parent / "cgroup.procs").write_text(pid)
        place.rmdir()


def test_service_that_is_moved_to_another_cgroup(
    moved: Sequence[Path], service: StartService, clients: ExitStack
) -> None:
    """The workers that start from then on are counted there."""
    running = service(*OPTIONS, "-w", "2")
    kept_alive(clients, 2)
    (moved[1] / "cgroup.procs").write_text(str(running.pid))
    assert running.steer("reload").returncode == 0
    new = [each["slot"] for each in running.workers() if each["generation"] == 2]
    assert Counter(kept_alive(clients, 6)) == dict.fromkeys(new, 3)
    assert open_at(running) == {**open_at(running), **dict.fromkeys(new, 3)}
    # Of one in both cgroups each connection is counted once.
    (moved[2] / "cgroup.procs").write_text(str(running.pid))
    assert running.steer("restart", str(new[0])).returncode == 0
    clients.close()
    eventually(lambda: is_idle(running))
    kept_alive(clients, 4)
    assert sorted(filter(None, open_at(running).values())) == [2, 2]


def test_service_that_is_adopted_in_another_cgroup(
    moved: Sequence[Path], service: StartService, clients: ExitStack
) -> None:
    first = service(*OPTIONS, "-w", "2")
    first.send_signal(signal.SIGKILL)
    first.wait()
    (moved[1] / "cgroup.procs").write_text(str(os.getpid()))
    second = service(*OPTIONS, "-w", "2")
    assert second.steer("reload").returncode == 0
    new = [each["slot"] for each in second.workers() if each["generation"] == 2]
    assert Counter(kept_alive(clients, 6)) == dict.fromkeys(new, 3)
    there = open_at(second)  # with those of the first generation that have not left yet
    assert {slot: there[slot] for slot in new} == dict.fromkeys(new, 3)


def test_whatever_the_policy(service: StartService) -> None:
    running = service("--policy=hash", "-w", "2")
    with ExitStack() as clients:
        counted = Counter(kept_alive(clients, 10))
        assert open_at(running) == {slot: counted[slot] for slot in (0, 1)}
    eventually(lambda: is_idle(running))


def test_worker_that_is_killed(service: StartService, clients: ExitStack) -> None:
    running = service(*OPTIONS, "-w", "3")
    kept_alive(clients, 6)
    os.kill(running.workers()[1]["pid"], signal.SIGKILL)
    eventually(lambda: "killed by" in running.log)
    running.wait_ready()
    assert sorted(open_at(running).values(), key=int) == [0, 2, 2]
    kept_alive(clients, 2)
    assert set(open_at(running).values()) == {2}


def test_queue_of_one_that_hangs(service: StartService, clients: ExitStack) -> None:
    """It is counted where it is rescued to; what it had taken before stays its own."""
    running = service("--policy=least-conn", "--hang-timeout=0.3", "--hang=skip", "-w", "2")
    kept_alive(clients, 2)
    hung, other = running.workers()
    freeze(hung)
    waiting = clients.enter_context(socket.create_connection(("127.0.0.1", PORT), DEADLINE_S))
    more = clients.enter_context(socket.create_connection(("127.0.0.1", PORT), DEADLINE_S))
    assert open_at(running) == {0: 2, 1: 2}
    eventually(lambda: running.workers()[0]["state"], "hung")
    eventually(lambda: open_at(running), {hung["slot"]: 1, other["slot"]: 3})
    waiting.close()
    more.close()
    eventually(lambda: open_at(running), {hung["slot"]: 1, other["slot"]: 1})
    send(hung, signal.SIGCONT)


def test_one_that_hangs_strands_few(service: StartService, clients: ExitStack) -> None:
    """Of 400 connections two at most, before any timeout acts: it never has the fewest again."""
    running = service(*OPTIONS, "-w", "4")
    hung = running.workers()[2]
    freeze(hung)
    for _ in range(100):
        batch = [request() for _ in range(4)]
        eventually(lambda batch=batch: sum(map(is_answered, batch)) >= 3)
        for sock in batch:
            clients.enter_context(sock)
    assert running.selected()[hung["slot"]] <= 2
    send(hung, signal.SIGCONT)


def test_reload(service: StartService, clients: ExitStack) -> None:
    """What waits moves to the new workers and is counted there; nothing of the old ones is."""
    running = service(*OPTIONS, "-w", "2", "--graceful-timeout=0")
    old = running.workers()
    kept_alive(clients, 4)
    for each in old:
        freeze(each)
    waiting = [Client(clients) for _ in range(6)]
    eventually(lambda: open_at(running), {0: 5, 1: 5})
    running.ask("reload")
    slots = [client.ask() for client in waiting]
    eventually(lambda: len(running.workers()), 2)
    fresh = open_at(running)
    assert fresh.keys().isdisjoint(each["slot"] for each in old)
    assert fresh == {slot: slots.count(slot) for slot in fresh}


def test_all_workers_killed_and_what_waits_meanwhile(
    service: StartService, clients: ExitStack
) -> None:
    """It waits at the backup listener, moves to the new workers, and is counted there."""
    running = service(*OPTIONS, "-w", "2")
    for worker in running.workers():
        os.kill(worker["pid"], signal.SIGKILL)
    eventually(lambda: running.log.count("killed by"), 2)
    alive = [Client(clients) for _ in range(6)]
    running.wait_ready()
    slots = [client.ask() for client in alive]
    assert open_at(running) == {slot: slots.count(slot) for slot in open_at(running)}
    for client in alive:
        client.sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: is_idle(running))


def test_another_controller_counts_on(service: StartService, clients: ExitStack) -> None:
    first = service(*OPTIONS, "-w", "2")
    alive = [Client(clients) for _ in range(4)]
    for client in alive:
        client.ask()
    first.send_signal(signal.SIGKILL)
    first.wait()
    alive[0].sock.shutdown(socket.SHUT_RDWR)
    alive += [Client(clients), Client(clients)]
    second = service(*OPTIONS, "-w", "2", ready=False).wait_ready(2)
    eventually(lambda: sum(open_at(second).values()), 5)
    kept_alive(clients, 1)
    assert open_at(second) == {0: 3, 1: 3}


def is_forgotten(running: Service, pid: int) -> bool:
    return all(each["pid"] != pid for each in running.workers())


def test_nothing_is_left_over_after_a_bad_day(service: StartService, clients: ExitStack) -> None:
    """Kills, reloads, resets and queues that move: in the end nothing is open."""
    running = service(*OPTIONS, "-w", "3", "--backlog=64")
    for turn in range(6):
        with clients:
            for _ in range(30):
                client = clients.enter_context(request("/?sleep_ms=20"))
                if turn % 2:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            # Old workers of a reload may end by themselves at any moment.
            ready = [each for each in running.workers() if each["state"] == "ready"]
            killed = ready[turn % 3]["pid"]
            os.kill(killed, signal.SIGKILL)
            if turn % 3 == 2:
                running.ask("reload")
        eventually(partial(is_forgotten, running, killed))
        running.wait_ready(3)
    eventually(lambda: is_idle(running))


# ---- where it cannot be counted


def uncounted(
    *prefix: str, environment: dict[str, str], home: Path, clients: ExitStack
) -> tuple[Service, str]:
    """A service that is started by way of this command, and the note that says why."""
    run = (*prefix, STEER, "run", "--name", "test", *OPTIONS, "-w", "3")
    process = launch(run, environment=environment, home=home, records=home)
    running = Service(process, "test", home, home, environment)
    clients.callback(running.clean_up)
    running.wait_ready()
    assert running.status()["backend"] == "ebpf"
    assert set(open_at(running).values()) == {None}
    (note,) = running.status()["notes"]
    assert note.startswith("open connections are not counted: ")
    return running, note


@pytest.mark.needs("root")
def test_without_a_cgroup(environment: dict[str, str], home: Path, clients: ExitStack) -> None:
    unmounted = ("unshare", "--mount", "sh", "-c", 'umount -a -t cgroup2 && exec "$@"', "sh")
    _, note = uncounted(*unmounted, environment=environment, home=home, clients=clients)
    why_not = "no cgroup v2 is mounted; mount -t cgroup2 none /sys/fs/cgroup"
    assert note.startswith(f"open connections are not counted: {why_not}; ")


@pytest.mark.needs("root")
def test_why_auto_does_not_count_is_said_once(
    environment: dict[str, str], home: Path, clients: ExitStack
) -> None:
    unmounted = ("unshare", "--mount", "sh", "-c", 'umount -a -t cgroup2 && exec "$@"', "sh")
    run = (*unmounted, STEER, "run", "--name", "test", "-w", "1")
    process = launch(run, environment=environment, home=home, records=home)
    running = Service(process, "test", home, home, environment)
    clients.callback(running.clean_up)
    running.wait_ready()
    words = (
        "policy auto is hash, as open connections cannot be counted: no cgroup v2 is mounted;"
        " mount -t cgroup2 none /sys/fs/cgroup"
    )
    shown = running.steer("status").stdout.replace("\n  ", " ")
    assert words in shown
    assert shown.count("no cgroup v2") == 1
    assert running.log.count("no cgroup v2") == 1


@pytest.mark.needs("root")
def test_without_the_capability_queues_are_sampled(
    environment: dict[str, str], home: Path, clients: ExitStack
) -> None:
    without = ("setpriv", "--bounding-set=-net_admin,-sys_admin", "--")
    running, note = uncounted(*without, environment=environment, home=home, clients=clients)
    assert "EPERM" in note
    hung = running.workers()[1]
    freeze(hung)
    clients.callback(send, hung, signal.SIGCONT)

    before = running.selected()[hung["slot"]]
    for _ in range(20):
        batch = [clients.enter_context(request()) for _ in range(20)]
        lost = running.selected()[hung["slot"]] - before
        before += lost
        eventually(lambda batch=batch, lost=lost: sum(map(is_answered, batch)) == 20 - lost)
    assert running.selected()[hung["slot"]] <= 66, "blindly it would be 133 of 400"


def test_what_waits_in_two_backup_listeners_is_counted(clients: ExitStack) -> None:
    """From the first connection on, and wherever it goes."""
    with Harness(EBPF, "least-conn", "tcp4", "tcp6", workers=2) as harness:
        harness.backend.backup.open()
        waiting = [
            clients.enter_context(harness.send(bind)) for bind in harness.binds for _ in range(4)
        ]
        spare = harness.plan.slots
        count = harness.backend.open
        eventually(lambda: (count(spare) or 0) + (count(spare + 1) or 0), len(waiting))
        harness.join(0, 1)
        harness.steer()
        harness.backend.backup.empty()
        eventually(lambda: (count(0) or 0) + (count(1) or 0), len(waiting))
        assert (count(spare), count(spare + 1)) == (0, 0)
        harness.take(len(waiting))
        clients.close()
        eventually(lambda: {count(slot) for slot in (0, 1, spare, spare + 1)}, {0})
