"""Whatever happens to workers and controller, every request is answered, once.

STEER_FAULT_SEED, if set, is another seed, and STEER_FAULT_S how many seconds the longest lasts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from steer.backends import backup
from steer.linux import processes
from testkit.fault_load import PORT, Load, Record, load
from testkit.fault_player import Player, Worker, listening
from testkit.faults import ALL, Death, Held, Kind, Request, lost, sequence
from testkit.fixtures import StartService
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually, is_running, tcp_count
from testkit.service import Service

WORKERS = 4
SEED = int(os.environ.get("STEER_FAULT_SEED", "1"))
LONG_S = float(os.environ.get("STEER_FAULT_S", "60"))
SHORT_S = LONG_S / 12
SKIPS = ("--hang=skip", "--graceful-timeout=100")
REPLACES = ("--hang=replace", "--graceful-timeout=3")


def test_sequence_is_the_same_for_the_same_seed() -> None:
    assert list(islice(sequence(1), 100)) == list(islice(sequence(1), 100))
    assert list(islice(sequence(1), 100)) != list(islice(sequence(2), 100))


def test_sequence_has_all_kinds_soon() -> None:
    assert {act.kind for act in islice(sequence(SEED), 28)} == set(ALL)
    assert {act.kind for act in islice(sequence(SEED, [Kind.KILL]), 28)} == {Kind.KILL}


@pytest.mark.parametrize(
    "port, begun_s, ended_s, is_lost",
    [(7, 1, 3, False), (8, 1, 3, True), (7, 2.5, 3, True), (7, 1, 1.5, True), (0, 1, 3, True)],
)
def test_only_what_was_accepted_then_may_fail(
    port: int, begun_s: float, ended_s: float, is_lost: bool
) -> None:
    request = Request(1, port, begun_s, ended_s, 0, "reset")
    held = Held(42, 2.0, frozenset({6, 7}))
    assert lost([request], [held]) == ([request] if is_lost else [])


def test_one_handshake_may_be_cut_off_by_a_death() -> None:
    reset = [Request(number, 0, 1.0, 2.0, 0, "ConnectionResetError()") for number in (1, 2)]
    refused = Request(3, 0, 1.0, 2.0, 0, "ConnectionRefusedError()")
    assert lost([*reset, refused], [], [Death(1.5, 3.0)]) == [reset[1], refused]
    assert lost(reset, [], [Death(2.5, 3.0), Death(0.0, 0.5)]) == reset


def test_as_many_may_be_reset_as_migrations_failed() -> None:
    reset = [Request(number, 7, 1.0, 2.0, 0, "ConnectionResetError()") for number in (1, 2)]
    refused = Request(3, 0, 1.0, 2.0, 0, "ConnectionRefusedError()")
    assert lost([refused, *reset], [], failed_migrations=1) == [refused, reset[1]]
    assert lost([refused, *reset], [], failed_migrations=3) == [refused]


@pytest.mark.needs("root", "bpf", "migrate", "pidfd_getfd")
@pytest.mark.timeout(LONG_S + 240)
def test_nothing_is_lost_in_a_minute_of_faults(service: StartService, home: Path) -> None:
    with playing(service, home, "round-robin", *SKIPS) as player:
        player.play(sequence(SEED), LONG_S)
    assert LONG_S < 60 or player.kinds == set(ALL)


@contextmanager
def playing(
    service: StartService, home: Path, policy: str, *options: str, backend: str = "ebpf"
) -> Iterator[Player]:
    """A service under load, to be played with; at the end everything has to be in order."""
    record = Record(home)
    bind, count = f"127.0.0.1:{PORT}", str(WORKERS)
    start = partial(
        service,
        *("app:serve", "-b", bind, "-w", count, "--policy", policy, "--backend", backend),
        *("--hang-timeout=1", *options),
        ready=False,
    )
    first = start().wait_ready()
    with load() as clients:
        player = Player(
            start, first, clients, record, WORKERS, options == REPLACES, backend == "ebpf"
        )
        try:
            yield player
            see_that_all_are_chosen(player.service, record)
            clients.end(DEADLINE_S)
            # On ebpf the program selects none of the listeners that are about to be closed.
            failed_migrations = 0 if backend == "ebpf" else tcp_count("TCPMigrateReqFailure")
            check_requests(player, clients, record, failed_migrations)
            check_kernel(player, clients)
        except BaseException as error:
            error.add_note(f"seed: {SEED}\n{player.report()}")
            raise
        finally:
            player.let_go()


def see_that_all_are_chosen(service: Service, record: Record) -> None:
    before = Counter(pid for _, pid in record.answered())
    pids = [each["pid"] for each in service.workers()]

    def answer() -> bool:
        now = Counter(pid for _, pid in record.answered())
        return all(now[pid] > before[pid] for pid in pids)

    eventually(answer)


def check_requests(player: Player, clients: Load, record: Record, failed_migrations: int) -> None:
    assert not clients.waiting
    assert lost(clients.requests, player.helds, player.deaths, failed_migrations) == []
    answered = {each.number: each.pid for each in clients.requests if each.pid}
    recorded = list(record.answered())
    assert [number for number, times in Counter(n for n, _ in recorded).items() if times > 1] == []
    assert answered.items() <= dict(recorded).items()
    gone = {pid for _, pid in recorded if not is_running(pid)}
    assert gone <= record.ended() | {held.pid for held in player.helds}, "a worker crashed"
    logs = "".join(each.log for each in player.services)
    assert "Traceback" not in logs
    assert "bug in steer" not in logs


def check_kernel(player: Player, clients: Load) -> None:
    """Status and kernel agree."""
    eventually(lambda: {each["connections"]["queued"] for each in as_told(player.service)}, {0})
    status = player.service.status()
    workers = status["workers"]
    assert [each["state"] for each in workers] == ["ready"] * player.wanted
    assert all(is_running(each["pid"]) for each in workers)
    told = {inode for each in workers for inode in each["sockets"]}
    assert all(set(each["sockets"]) <= processes.open_sockets(each["pid"]) for each in workers)
    ours = {inode for _, inode in processes.sockets_by_fd(player.service.pid)} & listening()
    if status["backend"] == "ebpf":
        assert len(ours) == backup.COUNT, "the backup listeners, and no duplicate of a worker's"
        assert listening() == told | ours
        check_counts(status["totals"], player, clients)
    else:
        assert listening() == told


def as_told(service: Service) -> list[Worker]:
    """The workers with their queues, as `steer status` tells of them."""
    (found,) = json.loads(service.steer("status", "--json").stdout)["services"]
    workers: list[Worker] = found["workers"]
    return workers


def check_counts(totals: dict[str, int], player: Player, clients: Load) -> None:
    """Each connection was counted once, by its SYN.

    Except those that had nobody to go to: they waited at the backup listener, and count as
    migrated where they went.
    """
    counted = totals["selected"] - totals["migrated"]
    may_lack = totals["unsteered"] + sum(
        begun_s <= each.begun_s <= ended_s
        for each in clients.requests
        for begun_s, ended_s in player.unmanned
    )
    assert len(clients.requests) - may_lack <= counted <= len(clients.requests)


@pytest.mark.needs("root", "bpf", "migrate", "pidfd_getfd")
@pytest.mark.parametrize(
    "seed, policy, how", [(1, "cpu", SKIPS), (2, "round-robin", REPLACES), (3, "hash", REPLACES)]
)
def test_nothing_is_lost_in_a_few_faults(
    service: StartService, home: Path, seed: int, policy: str, how: tuple[str, ...]
) -> None:
    with playing(service, home, policy, *how) as player:
        player.play(sequence(SEED + seed), SHORT_S)


_EVERYWHERE = (Kind.RELOAD, Kind.SCALE, Kind.RESTART, Kind.KILL, Kind.RERUN)
_MOVED_BY_KERNEL = {"kernel": _EVERYWHERE, "hash": (*_EVERYWHERE, Kind.DRAIN, Kind.UNDRAIN)}


@pytest.mark.needs("root")
@pytest.mark.parametrize("policy", _MOVED_BY_KERNEL)
def test_nothing_is_lost_where_the_kernel_is_told_to_migrate(
    service: StartService, netns: Netns, home: Path, policy: str
) -> None:
    netns.sysctl("net.ipv4.tcp_migrate_req", 1)
    backend = "cbpf" if policy == "hash" else "kernel"
    with playing(service, home, policy, *SKIPS, backend=backend) as player:
        player.play(sequence(SEED + 4, _MOVED_BY_KERNEL[policy]), SHORT_S)
