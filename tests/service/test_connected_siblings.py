"""Workers that open a connected SO_REUSEPORT socket for a client, as servers of DTLS do.

Such a socket is in no group. At an address that is no wildcard one that is bound later must not
make a group of its own with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from steer.errors import ControlError
from steer.policy.builtin import CBPF, EBPF
from steer.sockets import members, sock_diag
from testkit.capabilities import do_without
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.harness import CPUS, PORT, Harness, pinned
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually
from testkit.programs import source
from testkit.service import Service, wound

pytestmark = pytest.mark.usefixtures("netns")

APP = source("dtls")
HOSTS = {"127.0.0.1": "127.0.0.1", "[::1]": "::1", "0.0.0.0": "127.0.0.1", "[::]": "::1"}
"""Where it listens, and where clients send to."""
WORKERS, DATAGRAMS = 4, 200
SOON = wound("steer.health.split._AGAIN_S=1.0")
"""All are replaced again so long after the last time."""
_CAPS = "-all,+bpf,+net_admin,+perfmon"
AS_NOBODY_WITH_BPF = (
    "setpriv",
    "--reuid=nobody",
    f"--regid={NOBODY}",
    "--clear-groups",
    f"--inh-caps={_CAPS}",
    f"--ambient-caps={_CAPS}",
)


class Client:
    """One of its own address and port."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_DGRAM)
        self._sock.settimeout(DEADLINE_S)
        self._sock.connect((host, PORT))
        self._has_one_of_its_own = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_one_of_its_own:
            with suppress(OSError):
                self.send(b"bye")
        self._sock.close()

    @property
    def address(self) -> tuple[str, int]:
        host, port, *_ = self._sock.getsockname()
        return host, port

    def send(self, data: bytes = b"") -> None:
        self._sock.send(data)

    def ask(self, data: bytes = b"") -> dict[str, Any]:
        self.send(data)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._sock.recv(1000))
        self._has_one_of_its_own |= found["connected"]
        return found


def spread(host: str, number: int = DATAGRAMS) -> Counter[int]:
    """How many datagrams of new clients each slot gets; all are answered. They come in on one CPU,
    as each CPU takes turns of its own."""
    found: Counter[int] = Counter()
    with pinned(CPUS[0]):
        for _ in range(number):
            with Client(host) as client:
                found[client.ask()["slot"]] += 1
    return found


def slots(running: Service) -> set[int]:
    return {each["slot"] for each in running.workers() if each["state"] == "ready"}


def restart(running: Service, other: dict[str, Any]) -> None:
    running.ask("restart", slot=other["slot"])


def scale(running: Service, _other: dict[str, Any]) -> None:
    running.ask("scale", workers=WORKERS + 1)


def kill(running: Service, other: dict[str, Any]) -> None:
    os.kill(other["pid"], signal.SIGKILL)
    eventually(lambda: other["pid"] not in {each["pid"] for each in running.workers()})
    running.wait_ready(WORKERS)


def execute_again(running: Service, other: dict[str, Any]) -> None:
    before = running.log.count("adopted ")
    running.send_signal(signal.SIGUSR2)
    eventually(lambda: running.log.count("adopted ") > before)
    running.wait_ready(WORKERS)
    restart(running, other)


ACTS: list[Callable[[Service, dict[str, Any]], None]] = [restart, scale, kill, execute_again]
act = pytest.mark.parametrize("act", ACTS, ids=lambda each: each.__name__)


def start(
    service: StartService, home: Path, at: str, *options: str, under: Sequence[str] = ()
) -> Service:
    (home / "dtls.py").write_text(APP)
    arguments = ("-b", f"udp://{at}:{PORT}", "-w", str(WORKERS), "--hang-timeout=0", *options)
    # Not all, as one of an earlier controller may still finish.
    return service(*arguments, "dtls:serve", ready=False, under=under).wait_ready(WORKERS)


def connect(running: Service, client: Client) -> tuple[dict[str, Any], dict[str, Any]]:
    """The worker that has opened a socket for the client, and another one."""
    told = client.ask(b"connect")
    assert told["connected"]
    workers = sorted(running.workers(), key=lambda each: bool(each["slot"] != told["slot"]))
    return workers[0], workers[1]


Act = Callable[[Service, dict[str, Any]], None]


def spread_after(act: Act, running: Service, client: Client, at: str) -> Counter[int]:
    """How new datagrams are spread, by slot, over all workers there are after `act` on one that
    is not the client's; and that it keeps its own."""
    mine, other = connect(running, client)
    act(running, other)
    there = slots(running)
    found = spread(HOSTS[at])
    assert set(found) == there
    assert client.ask()["pid"] == mine["pid"]
    return found


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("at", HOSTS)
@act
def test_turns_go_on(
    service: StartService, home: Path, clients: ExitStack, at: str, act: Act
) -> None:
    running = start(service, home, at, "--policy=round-robin", "--backend=ebpf")
    client = clients.enter_context(Client(HOSTS[at]))
    found = spread_after(act, running, client, at)
    assert max(found.values()) - min(found.values()) <= 1
    assert client.ask()["connected"]
    assert running.status()["totals"]["unsteered"] == 0


@pytest.mark.parametrize("at", ["127.0.0.1", "[::1]"])
@act
def test_shares_go_on_without_privilege(
    service: StartService, home: Path, clients: ExitStack, at: str, act: Act
) -> None:
    running = start(service, home, at, "--policy=random", "--backend=cbpf")
    client = clients.enter_context(Client(HOSTS[at]))
    found = spread_after(act, running, client, at)
    assert max(found.values()) < DATAGRAMS / 2


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("at", ["127.0.0.1", "[::1]"])
def test_the_client_outlives_all_who_were_there(
    service: StartService, home: Path, clients: ExitStack, at: str
) -> None:
    """Its worker finishes with it, without a listener: its socket is the oldest there is."""
    running = start(service, home, at, "--policy=round-robin", "--backend=ebpf")
    client = clients.enter_context(Client(HOSTS[at]))
    mine, _ = connect(running, client)
    running.ask("reload")
    old = set(range(WORKERS)) - {mine["slot"]}
    eventually(lambda: old.isdisjoint(each["slot"] for each in running.workers()))
    family = socket.AF_INET6 if ":" in at else socket.AF_INET
    eventually(lambda: set(sock_diag.waiting("udp", family, PORT)).isdisjoint(mine["sockets"]))
    assert set(spread(HOSTS[at])) == slots(running)
    restart(running, next(each for each in running.workers() if each["pid"] != mine["pid"]))
    found = spread(HOSTS[at])
    assert set(found) == slots(running)
    assert max(found.values()) - min(found.values()) <= 1
    assert client.ask() == {"slot": mine["slot"], "pid": mine["pid"], "connected": True}


@pytest.mark.needs("bpf", "nobody")
@pytest.mark.parametrize("at", ["127.0.0.1", "[::1]", "0.0.0.0"])
def test_under_the_user_of_steer_itself(
    service: StartService, home: Path, clients: ExitStack, at: str
) -> None:
    """As docs/SOCKETS.md says to start it: not as root with --user, where the kernel refuses such
    a socket, as steer's are root's."""
    client = clients.enter_context(Client(HOSTS[at]))
    running = start(service, home, at, "--policy=round-robin", under=AS_NOBODY_WITH_BPF)
    assert running.status()["backend"] == EBPF
    assert client.ask(b"connect")["connected"]
    assert client.ask()["connected"]


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("at", ["127.0.0.1", "[::1]", "0.0.0.0"])
def test_under_another_user_the_kernel_refuses(
    service: StartService, home: Path, clients: ExitStack, at: str
) -> None:
    """Should that change, docs/SOCKETS.md has to."""
    client = clients.enter_context(Client(HOSTS[at]))
    running = start(service, home, at, "--policy=random", "--backend=cbpf", "--user=nobody")
    client.send(b"connect")
    eventually(lambda: "Address already in use" in running.log)


@pytest.mark.needs("bpf")
def test_adopted(service: StartService, home: Path, clients: ExitStack) -> None:
    options = ("127.0.0.1", "--policy=round-robin", "--backend=ebpf")
    first = start(service, home, *options)
    client = clients.enter_context(Client("127.0.0.1"))
    mine, other = connect(first, client)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start(service, home, *options)
    restart(second, other)
    found = spread("127.0.0.1")
    assert set(found) == slots(second)
    assert max(found.values()) - min(found.values()) <= 1
    assert client.ask()["pid"] == mine["pid"]


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("backend, policy", [(EBPF, "round-robin"), (CBPF, "random")])
def test_what_comes_while_nobody_serves_waits_at_who_starts(
    service: StartService, home: Path, clients: ExitStack, backend: str, policy: str
) -> None:
    """And not at what holds the group together. It is so at the start, and when all have died."""
    (home / "dtls.py").write_text(APP)
    options = ("-b", f"udp://127.0.0.1:{PORT}", "-w2", f"--policy={policy}", f"--backend={backend}")
    (home / "wait").touch()
    running = service(*options, "--hang-timeout=0", "dtls:serve", ready=False)
    eventually(lambda: "2 workers" in running.log and len(bound(running)) == 2)
    for is_first in (True, False):
        waiting = [clients.enter_context(Client("127.0.0.1")) for _ in range(100)]
        for client in waiting:
            client.send()
        (home / "wait").unlink()
        for client in waiting:
            client.answer()
        running.wait_ready(2)
        if is_first:
            (home / "wait").touch()
            old = running.workers()
            for each in old:
                os.kill(each["pid"], signal.SIGKILL)
            gone = {each["pid"] for each in old}
            eventually(
                lambda gone=gone: len(bound(running) - gone) == 2 and not bound(running) & gone
            )


def bound(running: Service) -> set[int]:
    """The processes of workers that have bound their sockets, once the service can be asked."""
    try:
        return {each["pid"] for each in running.workers() if each["pid"] and each["sockets"]}
    except ControlError:
        return set()


def test_all_are_replaced_where_the_kernel_chooses(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """Nothing holds such a group together, as the kernel's hash would choose it."""
    if members.connected_stay():
        do_without("Linux 6.13: until then no group comes apart")
    running = start(service, home, "127.0.0.1", "--policy=kernel")
    client = clients.enter_context(Client("127.0.0.1"))
    mine, other = connect(running, client)
    restart(running, other)
    eventually(lambda: running.status()["generation"], 2)
    # One that ends loses what the hash has just sent it.
    eventually(
        lambda: [each["pid"] for each in running.workers() if each["generation"] < 2], [mine["pid"]]
    )
    found = spread("127.0.0.1")
    assert set(found) == slots(running)
    assert max(found.values()) < DATAGRAMS / 2
    assert client.ask() == {"slot": mine["slot"], "pid": mine["pid"], "connected": True}
    assert "all workers are replaced; bind udp://0.0.0.0:" in running.log
    assert any("as DTLS servers do" in note for note in running.status()["notes"])


@pytest.mark.parametrize("at", ["127.0.0.1", "[::1]"])
def test_all_are_replaced_each_time(
    service: StartService, home: Path, clients: ExitStack, at: str
) -> None:
    """Also where another worker starts soon after the last time: a little later then."""
    if members.connected_stay():
        do_without("Linux 6.13: until then no group comes apart")
    running = start(service, home, at, "--policy=kernel", under=SOON)
    mine = [connect(running, clients.enter_context(Client(HOSTS[at])))[0]]
    for generation in (2, 3):
        young = [each for each in running.workers() if each["generation"] == generation - 1]
        restart(running, next(each for each in young if each["pid"] != mine[-1]["pid"]))
        is_whole(running, generation, mine)
        found = spread(HOSTS[at])
        assert set(found) == slots(running)
        assert max(found.values()) < DATAGRAMS / 2
        mine += [connect(running, clients.enter_context(Client(HOSTS[at])))[0]]


def is_whole(running: Service, generation: int, mine: list[dict[str, Any]]) -> None:
    """All workers are of this generation but those that have clients of their own, and these have
    closed what new clients came to."""
    eventually(lambda: running.status()["generation"], generation)
    have = {each["pid"] for each in mine if each["generation"] < generation}
    eventually(
        lambda: (
            {each["pid"] for each in running.workers() if each["generation"] < generation} <= have
        )
    )
    old = {inode for each in mine for inode in each["sockets"] if each["pid"] in have}
    families = (socket.AF_INET, socket.AF_INET6)
    eventually(
        lambda: all(old.isdisjoint(sock_diag.waiting("udp", each, PORT)) for each in families)
    )


def is_even(host: str) -> None:
    """No socket gets what two would, in the end: one that was bound while the group was apart is in
    another group until the next look, and all are replaced once more."""
    eventually(lambda: max(spread(host).values()) < DATAGRAMS / 2)


def test_it_is_tried_again_where_new_workers_do_not_come_up(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    if members.connected_stay():
        do_without("Linux 6.13: until then no group comes apart")
    running = start(service, home, "127.0.0.1", "--policy=kernel", under=SOON)
    mine, other = connect(running, clients.enter_context(Client("127.0.0.1")))
    (home / "fail").touch()
    restart(running, other)
    eventually(lambda: "generation 1 serves on" in running.log)
    assert running.status()["generation"] == 1
    (home / "fail").unlink()
    is_whole(running, 2, [mine])
    is_even("127.0.0.1")


def test_the_next_controller_replaces_them(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """Where the one that saw it is killed before it could."""
    if members.connected_stay():
        do_without("Linux 6.13: until then no group comes apart")
    options = ("127.0.0.1", "--policy=kernel")
    first = start(service, home, *options)
    client = clients.enter_context(Client("127.0.0.1"))
    mine, other = connect(first, client)
    (home / "fail").touch()
    restart(first, other)
    eventually(lambda: "generation 1 serves on" in first.log)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (home / "fail").unlink()
    second = start(service, home, *options)
    is_whole(second, 2, [mine])
    is_even("127.0.0.1")
    assert client.ask()["pid"] == mine["pid"]
    assert any("as DTLS servers do" in note for note in second.status()["notes"])
    assert "all workers are replaced; bind udp://0.0.0.0:" in second.log


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("at", ["127.0.0.1", "[::1]"])
def test_back_from_the_kernel(
    service: StartService, home: Path, clients: ExitStack, at: str
) -> None:
    """What held the group together had to go with the program, and workers start meanwhile."""
    if members.connected_stay():
        do_without("Linux 6.13: until then no group comes apart")
    running = start(service, home, at, "--policy=hash", "--backend=ebpf", under=SOON)
    client = clients.enter_context(Client(HOSTS[at]))
    mine, other = connect(running, client)
    running.ask("policy", policy="kernel")
    restart(running, other)
    is_whole(running, 2, [mine])
    old = {mine["pid"]}
    restart(running, next(each for each in running.workers() if each["pid"] not in old))
    assert running.ask("policy", policy="hash")["backend"] == "ebpf"
    is_whole(running, 3, [mine])
    before = running.selected()
    found = spread(HOSTS[at])
    assert set(found) == slots(running)
    assert max(found.values()) < DATAGRAMS / 2
    after = running.selected()
    assert {slot: after[slot] - before[slot] for slot in found} == found
    assert client.ask()["pid"] == mine["pid"]


@pytest.mark.parametrize(
    "at, options, is_told",
    [
        ("127.0.0.1", ("--policy=kernel",), True),
        ("0.0.0.0", ("--policy=kernel",), False),
        ("127.0.0.1", ("--policy=random", "--backend=cbpf"), False),
    ],
)
def test_check_tells_of_it(
    steer: RunSteer, at: str, options: tuple[str, ...], is_told: bool
) -> None:
    done = steer("check", "-b", f"udp://{at}:{PORT}", *options, "--demo")
    assert done.returncode == 0, done.stderr
    splits = is_told and not members.connected_stay()
    assert ("as DTLS servers do" in " ".join(done.stdout.split())) == splits


def test_on_cbpf_the_kernel_chooses_where_connected_sockets_stay_in_the_group(
    netns: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 6.13: nobody knows at which index a worker stands that comes or goes then."""
    monkeypatch.setattr(members, "connected_stay", lambda: True)
    with Harness(CBPF, "random", "udp6", workers=4) as harness, Client("::1") as client:
        harness.join(0, 1, 2)
        harness.steer(0)
        assert harness.count(20) == {0: 20}
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sibling:
            sibling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sibling.bind(("::1", PORT))
            sibling.connect(client.address)
            harness.steer(0)
            assert harness.count(20) == {0: 20}
            harness.join(3)
        harness.steer(3)
        assert set(harness.count(200)) == {0, 1, 2, 3}
        assert harness.backend.order is None
        assert any("the kernel's hash selects" in note for note in harness.backend.notes)
