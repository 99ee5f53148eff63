"""`steer.ReuseportGroup`: who gets what, on each backend, from threads, children and others."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import steer
from steer.api import group_input
from steer.api.group import ReuseportGroup
from steer.errors import BindError, ConfigError, GroupError, KernelError, Note, SteerError
from steer.linux import processes
from steer.loader import shared_memory
from steer.testing import reuseport_group
from testkit import ROOT
from testkit.harness import pinned
from testkit.processes import (
    DEADLINE_S,
    descriptors,
    eventually,
    is_ready,
    is_running,
    line_of,
    python,
    running,
)

pytestmark = pytest.mark.usefixtures("netns")
EXAMPLES = ROOT / "examples"
BACKENDS = ("ebpf", "cbpf", "kernel")
PROTOCOLS = ("tcp", "udp")
NOT_OURS = "belongs to the process that made it"

all_protocols = pytest.mark.parametrize("protocol", PROTOCOLS)
all_backends = pytest.mark.parametrize("backend", BACKENDS)
bpf = pytest.mark.needs("bpf")


def send(group: ReuseportGroup) -> socket.socket:
    """A connection made, or a datagram sent, from a new socket."""
    is_tcp = group._bind.protocol == "tcp"
    family = socket.AF_INET6 if group._bind.is_v6 else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM)
    client.settimeout(DEADLINE_S)
    client.connect(group.address)
    if not is_tcp:
        client.send(b"x")
    return client


def take(socks: Sequence[socket.socket]) -> int:
    """Which of them has a connection or datagram; takes it."""

    def ready() -> list[int]:
        return [number for number, sock in enumerate(socks) if is_ready(sock)]

    (found,) = eventually(ready)
    if socks[found].type == socket.SOCK_DGRAM:
        socks[found].recv(16)
    else:
        socks[found].accept()[0].close()
    return found


def sequence(group: ReuseportGroup, socks: Sequence[socket.socket], number: int) -> list[int]:
    """The slots that get the next ones, one after the other."""
    found = []
    for _ in range(number):
        with send(group):
            found.append(take(socks))
    return found


@contextmanager
def listening(group: ReuseportGroup, slots: int, **options: int) -> Iterator[list[socket.socket]]:
    """That many, all active."""
    with ExitStack() as stack:
        socks = [stack.enter_context(group.listen(slot, **options)) for slot in range(slots)]
        group.activate(*range(slots))
        yield socks


def selected(group: ReuseportGroup) -> dict[int, int | None]:
    return {slot: counts.selected for slot, counts in group.counts().items()}


# ---- who is chosen


@bpf
@all_protocols
def test_turns_are_exact_and_counted(protocol: str) -> None:
    with (
        reuseport_group("round-robin", slots=3, protocol=protocol) as group,
        listening(group, 3) as socks,
        pinned(min(os.sched_getaffinity(0))),
    ):
        assert Counter(sequence(group, socks, 9)) == {0: 3, 1: 3, 2: 3}
        assert selected(group) == {0: 3, 1: 3, 2: 3}
        assert (group.backend, group.reason, group.policy) == ("ebpf", None, "round-robin")


@all_protocols
@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_drained_slots_get_none_until_they_are_active_again(backend: str, protocol: str) -> None:
    with (
        reuseport_group("random", slots=3, protocol=protocol, backend=backend) as group,
        listening(group, 3) as socks,
    ):
        group.drain(0, 2)
        assert set(sequence(group, socks, 20)) == {1}
        group.activate(2)
        group.drain(1)
        assert set(sequence(group, socks, 20)) == {2}


@all_protocols
def test_the_kernel_chooses_drained_slots_too_and_it_says_so(protocol: str) -> None:
    with (
        reuseport_group("hash", protocol=protocol, backend="kernel") as group,
        listening(group, 2) as socks,
    ):
        group.drain(0)
        assert set(sequence(group, socks, 60)) == {0, 1}
        assert any("until it closes its socket" in note for note in group.notes)
        assert group.counts()[0] == steer.SlotCounts()


@bpf
def test_shares_go_by_weight() -> None:
    with (
        reuseport_group("random") as group,
        group.listen(0, weight=1000) as first,
        group.listen(1) as second,
    ):
        group.activate(0, 1)
        table = group._slots.backend._policy._layout.entries  # type: ignore[attr-defined]
        assert table.count(0) == 1000 * table.count(1)
        assert len(sequence(group, [first, second], 5)) == 5


@all_backends
@pytest.mark.parametrize("address", ["[::1]:0", "udp://[::1]:0", ":0", "udp://[::]:0"])
def test_other_addresses(address: str, backend: str) -> None:
    with (
        ReuseportGroup(address, "hash", slots=2, backend=backend) as group,
        listening(group, 2, weight=3) as socks,
    ):
        assert group.address[1] > 0
        group.drain(1)
        got = sequence(group, socks, 20)
        assert set(got) == ({0, 1} if backend == "kernel" else {0})


@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_cpu_takes_the_slot_that_was_given_it(backend: str) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with reuseport_group("cpu", slots=len(cpus), backend=backend) as group, ExitStack() as stack:
        socks = [
            stack.enter_context(group.listen(slot, cpu=cpu))
            for slot, cpu in enumerate(reversed(cpus))
        ]
        group.activate(*range(len(cpus)))
        for slot, cpu in enumerate(reversed(cpus)):
            with pinned(cpu):
                assert sequence(group, socks, 5) == [slot] * 5


def test_small_answers_are_not_held_back() -> None:
    """As in a service: asyncio sees to that only where it knows the protocol of the socket."""
    with reuseport_group("hash") as group, listening(group, 2) as socks, send(group):
        number = next(iter(eventually(lambda: [s for s in (0, 1) if is_ready(socks[s])])))
        with socks[number].accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@bpf
def test_least_conn_goes_by_what_is_open() -> None:
    with reuseport_group("least-conn") as group, listening(group, 2) as socks, ExitStack() as held:
        for _ in range(6):
            held.enter_context(send(group))
            number = next(iter(eventually(lambda: [s for s in (0, 1) if is_ready(socks[s])])))
            held.enter_context(socks[number].accept()[0])
        assert {slot: counts.open for slot, counts in group.counts().items()} == {0: 3, 1: 3}


# ---- who comes and goes


@bpf
@all_protocols
def test_what_closes_gets_nothing_and_its_slot_can_be_taken_again(protocol: str) -> None:
    with (
        reuseport_group("round-robin", protocol=protocol) as group,
        listening(group, 2) as (first, second),
    ):
        first.close()
        assert sequence(group, [second], 8) == [0] * 8
        assert selected(group) == {0: 0, 1: 8}
        with group.listen(0) as third:
            group.activate(0)
            with pinned(min(os.sched_getaffinity(0))):
                assert Counter(sequence(group, [third, second], 8)) == {0: 4, 1: 4}
            assert group.counts()[0].selected == 4


@all_backends
@all_protocols
def test_one_that_is_removed_gets_nothing(backend: str, protocol: str) -> None:
    """On cbpf the last moves into the hole it leaves in the kernel's order."""
    with (
        reuseport_group("random", slots=3, protocol=protocol, backend=backend) as group,
        listening(group, 3) as (first, second, third),
    ):
        before = len(descriptors(os.getpid()))
        first.close()
        group.remove(0)
        assert len(descriptors(os.getpid())) == before - (2 if backend == "cbpf" else 1)
        group.drain(1)
        got = sequence(group, [second, third], 20)
        assert set(got) == ({0, 1} if backend == "kernel" else {1})
        with group.listen(0) as fourth:
            group.activate(0)
            group.drain(2)
            got = sequence(group, [fourth, second, third], 20)
            assert set(got) == ({0, 1, 2} if backend == "kernel" else {0})


@all_protocols
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::1]"])
def test_on_cbpf_one_that_is_removed_is_out_whoever_has_it(protocol: str, host: str) -> None:
    address = f"{protocol}://{host}:0"
    with (
        ReuseportGroup(address, "random", slots=3, backend="cbpf") as group,
        listening(group, 3) as (first, second, third),
        first.dup(),
    ):
        first.close()
        group.remove(0)
        for chosen, other in ((1, 2), (2, 1)):
            group.activate(chosen)
            group.drain(other)
            assert set(sequence(group, [second, third], 20)) == {chosen - 1}


@pytest.mark.needs("bpf", "migrate")
def test_what_waits_is_migrated_once_drained() -> None:
    with reuseport_group("round-robin") as group, listening(group, 2) as (first, second):
        group.drain(1)
        with send(group), send(group):
            group.activate(1)
            with pytest.raises(GroupError, match="it is active"):
                group.migrate(0, first)
            group.drain(0)
            assert group.migrate(0, first) == 0
            assert [take([first, second]) for _ in range(2)] == [1, 1]
        assert group.counts()[1].migrated == 2
        group.activate(0)
        group.drain(1)
        assert sequence(group, [first, second], 4) == [0] * 4


@bpf
def test_nothing_is_on_its_way_to_what_is_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that still choose it may run: they are waited for, once."""
    waits = []
    monkeypatch.setattr(shared_memory, "wait_for_programs", lambda: waits.append("waited"))
    with reuseport_group("hash") as group, listening(group, 2) as (first, _):
        group.drain(0)
        waits.clear()
        group.migrate(0, first)
        group.migrate(0, first)
        assert waits == ["waited"]


@all_backends
def test_only_the_socket_of_the_slot_is_migrated(backend: str) -> None:
    with reuseport_group("hash", backend=backend) as group, listening(group, 2) as (first, second):
        group.drain(0)
        with pytest.raises(GroupError, match=r"migrate slot 0 of .*: the socket is not that of"):
            group.migrate(0, second)
        with first.dup() as same, send(group):
            group.migrate(0, same)
        group.activate(0)
        group.drain(1)
        assert backend == "kernel" or sequence(group, [first], 4) == [0] * 4


@pytest.mark.needs("bpf", "migrate")
def test_what_waits_at_one_that_dies_goes_to_others() -> None:
    with reuseport_group("round-robin") as group, listening(group, 2) as (first, second):
        group.drain(1)
        with send(group), send(group):
            group.activate(1)
            first.close()
            assert [take([second]) for _ in range(2)] == [0, 0]
        counts = group.counts()
        assert (counts[0].selected, counts[1].migrated) == (2, 2)


def test_what_cannot_be_migrated_waits_on() -> None:
    with reuseport_group("hash", backend="cbpf") as group, listening(group, 2) as (first, second):
        group.drain(1)
        with send(group):
            eventually(lambda: is_ready(first))
            group.activate(1)
            group.drain(0)
            assert group.migrate(0, first) == 1
            assert take([first, second]) == 0
            assert any("are lost" in note for note in group.notes)


@bpf
@all_protocols
def test_policy_and_parameters_are_changed_without_a_socket_here(protocol: str) -> None:
    with (
        reuseport_group("round-robin", protocol=protocol) as group,
        listening(group, 2) as socks,
        ExitStack() as elsewhere,
    ):
        passed = [elsewhere.enter_context(sock.dup()) for sock in socks]
        for sock in socks:
            sock.close()
        group.set_policy("source", {"prefix4": 8})
        assert group.policy == "source"
        assert len(set(sequence(group, passed, 10))) == 1
        assert sum(filter(None, selected(group).values())) == 10
        group.set_policy("round-robin")
        with pinned(min(os.sched_getaffinity(0))):
            assert Counter(sequence(group, passed, 10)) == {0: 5, 1: 5}


def test_a_policy_that_is_not_on_the_backend_is_refused() -> None:
    with reuseport_group("hash", backend="cbpf") as group, listening(group, 2) as socks:
        with pytest.raises(ConfigError, match=r"not on cbpf: classic BPF keeps no state.*; make"):
            group.set_policy("round-robin")
        group.set_policy("random")
        group.drain(0)
        assert set(sequence(group, socks, 10)) == {1}
    with (
        reuseport_group("hash", backend="kernel") as group,
        pytest.raises(ConfigError, match="would steer nothing"),
    ):
        group.set_policy("random")


MINE = """
/* mine - everything to the first. */
#include "steer.h"
STEER_TABLE(turns)
STEER_POLICY(ctx, table)
{
	return 0;
}
"""


@pytest.mark.needs("bpf", "bcc")
def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.c"
    mine.write_text(MINE)
    with reuseport_group(str(mine)) as group, listening(group, 2) as socks:
        assert group.policy == "mine"
        assert set(sequence(group, socks, 4)) == {0, 1}


# ---- sockets of others


@all_protocols
@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_sockets_of_others_are_taken_in(backend: str, protocol: str) -> None:
    with (
        reuseport_group("random", protocol=protocol, backend=backend) as group,
        others(group) as first,
        others(group) as second,
    ):
        group.add(0, first)
        group.add(1, second)
        group.activate(1)
        assert set(sequence(group, [first, second], 10)) == {1}
        again = ReuseportGroup(group_input.text_of(group._bind), "hash", slots=1)
        with again, pytest.raises(BindError, match="EADDRINUSE"):
            again.listen(0)


@all_backends
@all_protocols
def test_a_socket_is_in_one_slot_only(backend: str, protocol: str) -> None:
    with (
        reuseport_group("random", slots=3, protocol=protocol, backend=backend) as group,
        group.listen(0) as first,
        group.listen(2) as last,
    ):
        words = r"slot 1 of .*: the socket is in slot 0 already; .*remove\(0\)"
        with first.dup() as same:
            for sock in (first, same):
                with pytest.raises(GroupError, match=words):
                    group.add(1, sock, weight=7)
        assert list(group.counts()) == [0, 2]
        group.activate(0, 2)
        group.drain(0)
        assert backend == "kernel" or set(sequence(group, [first, last], 20)) == {1}


def others(group: ReuseportGroup, reuse: bool = True, listen: bool = True) -> socket.socket:
    is_tcp = group._bind.protocol == "tcp"
    sock = socket.socket(type=socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
    sock.bind(group.address)
    if is_tcp and listen:
        sock.listen()
    return sock


def test_sockets_that_cannot_be_of_the_group_are_refused(listener: socket.socket) -> None:
    def refused(sock: socket.socket, words: str) -> None:
        with sock, pytest.raises(GroupError, match=rf"add to slot 0 of tcp .*: {words}.*; "):
            group.add(0, sock)

    with reuseport_group() as group:
        refused(listener, "it is bound to 127.0.0.1")
        refused(socket.socket(type=socket.SOCK_DGRAM), "it is AF_INET SOCK_DGRAM")
        refused(others(group, listen=False), "it does not listen")
        refused(others(group, reuse=False), "it has no SO_REUSEPORT")
        closed = others(group)
        closed.close()
        refused(closed, "the socket is closed")


@bpf
def test_a_stranger_is_not_joined() -> None:
    with (
        reuseport_group() as group,
        others(group),
        pytest.raises(BindError, match="EADDRINUSE, in use by"),
    ):
        group.listen(0)


# ---- what cannot be


@pytest.mark.parametrize(
    "give, words",
    [
        ({"address": "nonsense"}, "malformed"),
        ({"policy": "rundom"}, "unknown policy; did you mean 'random'"),
        ({"policy": "no/such.c"}, "no/such.c"),
        (
            {"address": None},
            "ReuseportGroup: address = None: no value, not a string; allowed: host",
        ),
        ({"address": ("127.0.0.1", 0)}, "address = .*: a list, not a string; allowed: host:port"),
        ({"policy": b"hash"}, "policy = b'hash': a bytes object, not a string; allowed: auto, "),
        ({"policy": None}, "policy = None: no value, not a string; allowed: auto, "),
        ({"slots": 0}, "slots = 0: too small; allowed: 1 to 1024"),
        ({"slots": "auto"}, "slots = 'auto': a string, not a whole number; allowed: 1 to 1024"),
        ({"slots": 2.0}, "slots = 2.0: a number, not a whole number; allowed: 1 to 1024"),
        ({"slots": True}, "slots = True: a boolean, not a whole number; allowed: 1 to 1024"),
        ({"params": [("prefix4", 24)]}, "params = .*: not a mapping of names to whole numbers; "),
        ({"params": {4: 24}}, "params = .*: not a mapping of names to whole numbers; allowed: "),
        (
            {"params": {"x": True}},
            r"params\['x'\] = True: a boolean, not a whole number; allowed: ",
        ),
        ({"params": {"x": 2**40}}, r"params\['x'\] = 1099511627776: too large; allowed: 0 to "),
        ({"backend": "xdp"}, "backend = 'xdp'.*allowed: auto, ebpf, cbpf, kernel"),
        ({"policy": "hash", "params": {"x": 1}}, "x"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(give: dict[str, object], words: str) -> None:
    usual = {"address": "127.0.0.1:8000", "policy": "hash", "slots": 2}
    with pytest.raises(SteerError, match=words):
        ReuseportGroup(**{**usual, **give})  # type: ignore[arg-type]


def test_slots_that_cannot_be_are_refused() -> None:
    with reuseport_group() as group, group.listen(0):
        calls: dict[str, Callable[[], object]] = {
            "slot 2 of .*: no such slot; allowed: 0 to 1": lambda: group.listen(2),
            "slot -1 of .*: no such slot": lambda: group.listen(-1),
            "slot 0 of .*: it is taken; close its socket": lambda: group.listen(0),
            "slot 1 of .*: no socket has joined there; listen": lambda: group.activate(0, 1),
            "use slot 1 of .*: no socket has joined": lambda: group.remove(1),
        }
        for words, call in calls.items():
            with pytest.raises(GroupError, match=words):
                call()
        assert list(group.counts()) == [0]
        group.listen(1).close()


WRONG_FOR_LISTEN: dict[str, Sequence[object]] = {
    "weight": (0, 1001, "3", 1.5, None, True),
    "cpu": (-1, 99999, "0", 1.0, True),
    "backlog": (-1, "x", None, 2**40),
}


@all_backends
def test_arguments_that_cannot_be_are_named(backend: str) -> None:
    with reuseport_group("hash", backend=backend) as group, group.listen(0) as sock:
        for name, wrong in WRONG_FOR_LISTEN.items():
            for value in wrong:
                words = rf": {name} = {re.escape(repr(value))}: .*; allowed: \d+ to \d+"
                with pytest.raises(ConfigError, match=words):
                    group.listen(1, **{name: value})  # type: ignore[arg-type]
        slots: list[Any] = [[0, 1], "0", 1.0, True, None, -1, 2, 10**9]
        for slot in slots:
            for call in (group.listen, group.activate, group.drain, group.remove):
                with pytest.raises(GroupError, match=r"slot .*: no such slot; allowed: 0 to 1"):
                    call(slot)
        socks: list[Any] = ["x", None, sock.fileno()]
        for other in socks:
            with pytest.raises(GroupError, match="not a socket; give a socket"):
                group.add(1, other)
            with pytest.raises(GroupError, match="not a socket; give a socket"):
                group.migrate(0, other)
        policies: list[Any] = [None, b"hash", 3]
        for policy in policies:
            with pytest.raises(ConfigError, match=r"policy = .*, not a string; allowed: auto, "):
                group.set_policy(policy)
        if backend != "kernel":
            group.set_policy("random", None)
        assert list(group.counts()) == [0]


def test_weights_do_not_keep_a_policy_from_the_backend_that_it_needs() -> None:
    """Nor do those of a slot that has none any more."""
    words = "not on cbpf: it runs on kernel only; make another group for it"
    with reuseport_group("hash", backend="cbpf") as group, group.listen(0, weight=3):
        with pytest.raises(ConfigError, match=words):
            group.set_policy("kernel")
        group.set_policy("random")
        assert group._slots.plan.service.weights == (3, 1)
        group.remove(0)
        group.listen(0).close()
        assert not group._slots.plan.service.weights


def test_over_udp_nothing_is_migrated() -> None:
    with reuseport_group(protocol="udp") as group, listening(group, 2) as socks:
        group.drain(0)
        with pytest.raises(GroupError, match="datagrams cannot be moved"):
            group.migrate(0, socks[0])


def test_a_closed_group_is_refused_and_closed_again_is_not() -> None:
    with reuseport_group() as group:
        pass
    group.close()
    with pytest.raises(GroupError, match="it is closed"):
        group.listen(0)


@all_protocols
@pytest.mark.parametrize("backend", ["ebpf", "cbpf"])
def test_sockets_of_a_closed_group_are_chosen_as_before(backend: str, protocol: str) -> None:
    with (
        reuseport_group("random", slots=3, protocol=protocol, backend=backend) as group,
        listening(group, 3) as socks,
    ):
        group.drain(0, 2)
        group.close()
        assert set(sequence(group, socks, 20)) == {1}


# ---- processes


def accept_in_child(sock: socket.socket, told: int) -> None:
    """For each connection or datagram a byte; never returns."""
    os.set_blocking(sock.fileno(), True)
    while True:
        if sock.type == socket.SOCK_DGRAM:
            sock.recv(16)
        else:
            sock.accept()[0].close()
        os.write(told, b"x")


@contextmanager
def forked(work: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """A child and what it writes; ended afterwards."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(writes)
        finally:
            os._exit(1)
    os.close(writes)
    try:
        yield pid, reads
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reads)


@bpf
@all_protocols
def test_a_forked_child_serves_and_what_dies_is_out(protocol: str) -> None:
    with reuseport_group("round-robin", protocol=protocol) as group, group.listen(1) as ours:
        with group.listen(0) as theirs:

            def work(told: int) -> None:
                group.close()
                ours.close()
                accept_in_child(theirs, told)

            with forked(work) as (_, told):
                theirs.close()
                group.activate(0)
                for _ in range(5):
                    with send(group):
                        assert os.read(told, 1) == b"x"
                assert selected(group) == {0: 5, 1: 0}
                group.activate(1)
        assert sequence(group, [ours], 6) == [0] * 6
        counts = group.counts()
        assert (counts[0].selected, counts[1].selected) == (5, 6)


def in_child(group: ReuseportGroup) -> dict[str, str]:
    """What each method says there."""
    calls: dict[str, Callable[[], object]] = {
        "listen": lambda: group.listen(1),
        "add": lambda: group.add(1, socket.socket()),
        "activate": lambda: group.activate(0),
        "drain": lambda: group.drain(0),
        "migrate": lambda: group.migrate(0, socket.socket()),
        "remove": lambda: group.remove(0),
        "set_policy": lambda: group.set_policy("random"),
        "counts": group.counts,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ""
        except GroupError as error:
            found[name] = str(error)
    return found


@all_backends
def test_in_a_child_all_but_close_says_whose_it_is(backend: str) -> None:
    with reuseport_group("hash", backend=backend) as group, listening(group, 1) as socks:
        before = set(descriptors(os.getpid()).values())

        def work(told: int) -> None:
            found = in_child(group)
            mapped = [bytearray(1 << 20) for _ in range(64)]  # maybe where the maps were
            group.close()
            for each in mapped:
                each[::4096] = bytes(len(each[::4096]))
            mine = [each for each in descriptors(os.getpid()).values() if "bpf" in each]
            os.write(told, json.dumps([found, mine]).encode())

        with forked(work) as (_, told):
            says, left = json.loads(os.read(told, 65536))
        assert left == []
        assert set(says) == {
            name
            for name, value in vars(ReuseportGroup).items()
            if callable(value) and not name.startswith("_") and name != "close"
        }
        for words in says.values():
            assert f"{NOT_OURS}, {os.getpid()}; pass the sockets" in words
        # It goes on here.
        assert set(descriptors(os.getpid()).values()) == before
        assert sequence(group, socks, 3) == [0] * 3


def serve_spawned(sock: socket.socket, told: socket.socket) -> None:
    accept_in_child(sock, told.fileno())


@bpf
def test_multiprocessing_passes_sockets_and_not_the_group() -> None:
    spawn = multiprocessing.get_context("spawn")
    with reuseport_group("round-robin") as group:
        ours, theirs = socket.socketpair()
        with ours, theirs, group.listen(0) as sock:
            process = spawn.Process(target=serve_spawned, args=(sock, theirs), daemon=True)
            process.start()
            group.activate(0)
            sock.close()
            try:
                with send(group):
                    assert ours.recv(1) == b"x"
            finally:
                process.kill()
                process.join()
                process.close()
        with pytest.raises(GroupError, match=f"pickle the group at .*{NOT_OURS}; pass the sockets"):
            pickle.dumps(group)


@bpf
def test_another_program_is_sent_a_socket() -> None:
    code = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
_, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
with socket.socket(fileno=fd) as sock:
    while True:
        sock.accept()[0].close()
        print("took one", flush=True)
"""
    with reuseport_group("round-robin") as group:
        ours, theirs = socket.socketpair()
        with ours, theirs, running(*python(code, theirs.fileno()), fds=[theirs.fileno()]) as other:
            with group.listen(0) as sock:
                socket.send_fds(ours, [b"x"], [sock.fileno()])
            group.activate(0)
            for _ in range(3):
                with send(group):
                    assert line_of(other) == "took one"
            assert selected(group) == {0: 3}
            with group.listen(1) as left:
                group.activate(1)
                other.kill()
                other.wait()
                assert sequence(group, [left], 4) == [0] * 4
                assert selected(group) == {0: 3, 1: 4}


# ---- what it leaves alone


@all_backends
@all_protocols
def test_no_thread_no_handler_and_no_descriptor(backend: str, protocol: str) -> None:
    numbers = sorted(signal.valid_signals())

    def state() -> tuple[object, ...]:
        tasks = os.listdir("/proc/self/task")
        return [signal.getsignal(each) for each in numbers], threading.enumerate(), tasks

    with reuseport_group("hash", protocol=protocol, backend=backend):
        pass  # what is opened once and for all
    before, open_before = state(), descriptors(os.getpid())
    with (
        reuseport_group("hash", protocol=protocol, backend=backend) as group,
        listening(group, 2) as socks,
    ):
        sequence(group, socks, 3)
        if backend != "kernel":
            group.set_policy("random")
        assert state() == before
    assert state() == before
    assert descriptors(os.getpid()) == open_before


@all_backends
def test_it_is_closed_on_errors(backend: str) -> None:
    before = descriptors(os.getpid())
    with (
        pytest.raises(ZeroDivisionError),
        reuseport_group("hash", backend=backend) as group,
        group.listen(0),
    ):
        raise ZeroDivisionError
    assert descriptors(os.getpid()) == before
    for _ in range(2):
        with pytest.raises(ConfigError):
            ReuseportGroup("127.0.0.1:8000", "hash", slots=1, params={"no": 1})
    assert descriptors(os.getpid()) == before


@all_backends
def test_one_that_is_dropped_is_closed_with_a_warning(backend: str) -> None:
    before = descriptors(os.getpid())
    groups = [ReuseportGroup("127.0.0.1:0", "hash", slots=2, backend=backend)]
    address = groups[0].address
    with groups[0].listen(0):
        groups[0].activate(0)
    with pytest.warns(ResourceWarning, match=f"unclosed group at tcp 127.0.0.1:{address[1]}"):
        groups.clear()
    gc.collect()
    assert descriptors(os.getpid()) == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_only_what_is_needed_is_imported() -> None:
    code = """
import sys
with_python = set(sys.modules)
import steer
print(*sorted(set(sys.modules) - with_python))
with steer.ReuseportGroup("127.0.0.1:0", "hash", slots=1) as group:
    group.listen(0).close()
    group.set_policy("random")
print(*{"asyncio", "click", "threading", "subprocess", "multiprocessing"} & set(sys.modules))
"""
    with running(*python(code)) as process:
        assert line_of(process) == "steer"
        assert line_of(process) == ""


def test_what_is_public() -> None:
    assert steer.__all__ == [
        *("AppLoadError", "BindError", "CompileError", "Config", "ConfigError", "ControlError"),
        *("GroupError", "KernelError", "NotRunning", "Orphaned", "Refused", "ReuseportGroup"),
        *("Service", "ServiceConnection", "SlotCounts", "SteerError", "VerifierError", "Worker"),
        *("WorkersFailed", "__version__", "connect", "run"),
    ]
    assert set(steer.__all__) <= set(dir(steer))
    assert all(getattr(steer, name) is not None for name in steer.__all__)
    assert steer.ReuseportGroup is ReuseportGroup
    assert issubclass(steer.GroupError, SteerError)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = steer.nonsense


# ---- fallbacks

AS_NOBODY = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
import steer
for policy in ("hash", "round-robin", "auto"):
    with steer.ReuseportGroup("127.0.0.1:0", policy, slots=2) as group:
        print(group.policy, group.backend, group.reason, *group.notes, sep="|", flush=True)
"""


@pytest.mark.needs("root")
def test_without_privileges_it_falls_back_and_says_why() -> None:
    with running(*python(AS_NOBODY)) as process:
        hashed, turns, auto = (line_of(process).split("|") for _ in range(3))
    assert hashed[:2] == ["hash", "cbpf"]
    assert "ebpf: " in hashed[2]
    assert "EPERM; needs CAP_BPF" in hashed[2]
    assert turns[:2] == ["round-robin", "kernel"]
    assert "cbpf: classic BPF keeps no state" in turns[2]
    assert auto[:2] == ["hash", "cbpf"]
    assert "auto is hash, as " in auto[3]


@bpf
def test_load_that_is_not_counted_is_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service would look at accept queues; here nobody does."""
    from steer.backends.connections import Counting

    def stopped(self: Counting) -> None:
        self.why_not = Note("no cgroup")

    monkeypatch.setattr(Counting, "_start", stopped)
    with reuseport_group("least-conn") as group:
        assert group.backend == "kernel"
        assert "open connections are not counted: no cgroup" in (group.reason or "")
    with reuseport_group("auto") as group:
        assert (group.policy, group.backend) == ("hash", "ebpf")
        assert "auto is hash, as open connections cannot be counted: no cgroup" in group.notes
        with pytest.raises(KernelError, match="not counted: no cgroup"):
            group.set_policy("least-conn")
        assert group.policy == "hash"


# ---- examples


def ask(port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> bytes:
    with socket.socket(type=kind) as client:
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", port))
        client.sendall(b"hello\n")
        return client.recv(100)


def connects(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def example(name: str, port: int) -> Iterator[None]:
    with running(sys.executable, str(EXAMPLES / name)) as process:
        if port != 8002:
            eventually(lambda: process.poll() is not None or connects(port))
        assert process.poll() is None
        yield


def test_example_of_asyncio_has_a_worker_a_cpu_in_15_lines() -> None:
    _, _, code = (EXAMPLES / "asyncio_per_cpu.py").read_text().split('"""')
    lines = [line for line in code.splitlines() if line and not line.startswith("import ")]
    assert len(lines) <= 15
    with example("asyncio_per_cpu.py", 8000):
        for cpu in sorted(os.sched_getaffinity(0)):
            with pinned(cpu):
                assert ask(8000) == b"HELLO\n"


def test_example_of_multiprocessing_replaces_who_dies() -> None:
    with example("multiprocessing_group.py", 8001):
        pid = int(ask(8001).split()[0])
        os.kill(pid, signal.SIGKILL)
        # Until it has ended its listener is open, and may be selected.
        eventually(lambda: not is_running(pid))
        answers = [ask(8001).split() for _ in range(4)]
        assert all(words[1] == b"HELLO" and int(words[0]) != pid for words in answers)


def ignores_ctrl_c(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigIgn:")[2].split()[0], 16) & 1 << signal.SIGINT - 1)


def has_epoll(pid: int) -> bool:
    descriptors = Path(f"/proc/{pid}/fd")
    with suppress(OSError):
        return any("eventpoll" in os.readlink(each) for each in descriptors.iterdir())
    return False


@pytest.mark.parametrize("end", ["Ctrl-C", "TERM", "KILL"])
@pytest.mark.parametrize(
    "name, port", [("asyncio_per_cpu.py", 8000), ("multiprocessing_group.py", 8001)]
)
def test_examples_end_with_all_their_processes_and_without_a_traceback(
    name: str, port: int, end: str
) -> None:
    with session_of(name) as process:
        eventually(lambda: process.poll() is not None or connects(port))
        if port == 8001:  # two workers, and the resource tracker of multiprocessing
            eventually(lambda: sum(map(ignores_ctrl_c, processes.descendants(process.pid))), 3)
        else:  # PR_SET_PDEATHSIG takes effect only in a child that has got as far as that
            cpus = len(os.sched_getaffinity(0))
            eventually(lambda: sum(map(has_epoll, processes.descendants(process.pid))), cpus)
        workers = list(processes.descendants(process.pid))
        if end == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(getattr(signal, f"SIG{end}"))
        _, errors = process.communicate(timeout=DEADLINE_S)
        eventually(lambda: not any(map(is_running, workers)))
    assert not connects(port)
    assert "Traceback" not in errors


@contextmanager
def session_of(name: str) -> Iterator[subprocess.Popen[str]]:
    """Run an example in a session of its own, and kill whatever is left of it."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / name)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_example_of_udp_ends_without_a_traceback() -> None:
    with session_of("udp_group.py") as process:
        eventually(lambda: len(os.listdir(f"/proc/{process.pid}/task")), 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, "")


def test_example_of_udp_keeps_a_client_with_a_thread() -> None:
    with example("udp_group.py", 8002), socket.socket(type=socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", 8002))

        def answer() -> bytes:
            try:
                client.send(b"hello")
                return client.recv(100) if is_ready(client, 0.1) else b""
            except ConnectionRefusedError:
                return b""

        first = eventually(answer)
        assert first.split()[1] == b"HELLO"
        assert answer() == first
