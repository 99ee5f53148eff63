"""What happens to a service in a fault test, by a seed; and whose fault a lost request is. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    RELOAD = "reload"
    SCALE = "scale"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    RESTART = "restart"
    KILL = "kill"
    """SIGKILL to a worker."""
    STOP = "stop"
    """SIGSTOP to a worker."""
    CONT = "cont"
    """SIGCONT to one that was stopped."""
    RERUN = "rerun"
    """SIGKILL to the controller, and `steer run` again."""


_TIMES = {
    Kind.RELOAD: 3,
    Kind.SCALE: 4,
    Kind.DRAIN: 3,
    Kind.UNDRAIN: 3,
    Kind.RESTART: 3,
    Kind.KILL: 5,
    Kind.STOP: 3,
    Kind.CONT: 3,
    Kind.RERUN: 1,
}
ALL = tuple(Kind)
MOST_WORKERS = 8
_LONGEST_PAUSE_S = 0.3


@dataclass(frozen=True)
class Act:
    """One thing that happens.

    Args:
        pick: from 0 to 1: to whom, of those that it can happen to.
        workers: to scale to.
        amid: from 0 to 1: what else happens before it is over, if anything.
        pause_s: for the clients, before it.
    """

    kind: Kind
    pick: float
    workers: int
    amid: float
    pause_s: float

    def choose(self, among: Sequence[int]) -> int:
        return among[int(self.pick * len(among))]


def sequence(seed: int, kinds: Iterable[Kind] = ALL) -> Iterator[Act]:
    """Endless, and the same for the same seed.

    Kinds are dealt like cards, so that a short sequence too has seen most.
    """
    chance = random.Random(seed)
    wanted = [kind for kind in kinds for _ in range(_TIMES[kind])]
    while True:
        chance.shuffle(wanted)
        for kind in wanted:
            workers = chance.randint(1, MOST_WORKERS)
            pause_s = chance.uniform(0, _LONGEST_PAUSE_S)
            yield Act(kind, chance.random(), workers, chance.random(), pause_s)


@dataclass(frozen=True)
class Request:
    """One request in a connection of its own; times by CLOCK_MONOTONIC.

    Args:
        port: the client's, 0 if it was not even connected.
        pid: of the worker that answered, 0 if none did.
        error: what the client met in place of an answer.
    """

    number: int
    port: int
    begun_s: float
    ended_s: float
    pid: int
    error: str = ""

    @property
    def was_reset(self) -> bool:
        return "ConnectionResetError" in self.error


@dataclass(frozen=True)
class Held:
    """What a worker had accepted when it stood still.

    Args:
        ports: the clients' ends.
    """

    pid: int
    at_s: float
    ports: frozenset[int]

    def has(self, request: Request) -> bool:
        return request.port in self.ports and request.begun_s <= self.at_s <= request.ended_s


@dataclass(frozen=True)
class Death:
    """When a worker was killed: from the signal to when it was gone."""

    from_s: float
    to_s: float

    def cut_off(self, request: Request) -> bool:
        """Whether its handshake may have ended just while the listener closed.

        The kernel resets that one: it has made the connection, and then finds no queue to put
        it in (inet_csk_reqsk_queue_add() of net/ipv4/inet_connection_sock.c). Without steer, and
        with tcp_migrate_req at 1, these were 3 of 57,000 in 11,750 closes on 6.18.
        """
        was_reset = request.port == 0 and request.was_reset
        return was_reset and request.begun_s <= self.to_s and request.ended_s >= self.from_s


def lost(
    requests: Iterable[Request],
    helds: Sequence[Held],
    deaths: Sequence[Death] = (),
    failed_migrations: int = 0,
) -> list[Request]:
    """Those without an answer that no killed worker had accepted; but for one handshake a
    death, see `Death`.

    Args:
        failed_migrations: connections that the kernel reset as it migrated them to a listener
            that was just closed, see findings/migration-to-a-closing-listener.sh.
    """
    failed = (request for request in requests if request.error)
    unheld = [request for request in failed if not any(held.has(request) for held in helds)]
    for death in deaths:
        cut_off = next((request for request in unheld if death.cut_off(request)), None)
        if cut_off:
            unheld.remove(cut_off)
    for reset in [each for each in unheld if each.was_reset][:failed_migrations]:
        unheld.remove(reset)
    return unheld
