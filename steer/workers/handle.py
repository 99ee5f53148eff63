"""One worker of a service: its slot, its state, its process, and what has been seen of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import msgspec

from steer.backends.membership import Departure
from steer.config.plan import Generation, WorkerSpec
from steer.errors import KernelError, SteerError
from steer.linux import priority, processes
from steer.linux.activity import activity, cpu_s, is_asleep, is_runnable
from steer.linux.waiting import Seen, acceptors, waiters, waits_on
from steer.policy.layout import Member
from steer.workers.hang import Rest, is_busy
from steer.workers.lifecycle import STABLE_S, State
from steer.workers.process import WorkerProcess

if TYPE_CHECKING:
    from steer.workers.clock import Timer


class Cancellable(Protocol):
    """Something under way for a worker that may be cancelled."""

    def cancel(self) -> None: ...


class WorkerHandles:
    """All workers of a service, in the order in which they were added."""

    def __init__(self) -> None:
        self._there: dict[WorkerHandle, None] = {}

    def __iter__(self) -> Iterator[WorkerHandle]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def __contains__(self, worker: object) -> bool:
        return worker in self._there

    def add(self, worker: WorkerHandle) -> None:
        """Add it as the last."""
        self._there[worker] = None

    def remove(self, worker: WorkerHandle) -> None:
        """Raises KeyError: it is not there."""
        del self._there[worker]

    def sort(self, key: Callable[[WorkerHandle], tuple[int, int]]) -> None:
        """Put them into another order."""
        self._there = dict.fromkeys(sorted(self._there, key=key))


class WorkerHandle(msgspec.Struct, eq=False):
    """One worker: a process, or the wait for the next one.

    Args:
        held: not to be selected yet, as it is activated together with others.
        change: the number of the change that it is held for, or was.
        modest: to leave the CPUs to workers that serve, until it is ready.
        leaving: about to be retired with others, and not selected any more.
        told: of a worker that is held: called when it is ready, and when it has failed.
        failures: ends in a row before `lifecycle.STABLE_S` of service.
        says_ready: whether it sent READY=1.
        heard_s: when it last sent WATCHDOG=1, or got ready, by the controller's clock.
        takers: its processes that were seen to wait on its sockets.
        acceptors: threads of those that were.
        activity: of these, at the last look; see `linux.activity`.
        acted: whether these did anything since it was taken for hung.
        rest: how long it has been at rest, if it starts and cannot be looked at.
        cpu_s, cpu_at_s: CPU time that it had had, and when that was.
        hung: whether it was when it was retired.
        full: at capacity: it accepts nothing, and goes on with what it has.
        shed: not selected because it is full, as others have room.
        queued: connections in its accept queue at the last look.
        replace_not_before_s: when another worker may be asked for in its place again.
        left: by bind, why its socket there is not in the group as it was.
        is_apart: since it started, a socket of its own is in another group; see `health.split`.
        others: sockets it had open when it got ready, which are no connections.
        said: what it sent as STATUS=.
        error: why there is no process.
    """

    spec: WorkerSpec
    slot: int
    generation: Generation
    state: State = State.STARTING
    held: bool = False
    change: int = 0
    modest: bool = False
    leaving: bool = False
    told: Callable[[WorkerHandle], None] | None = None
    process: WorkerProcess | None = None
    ready_s: float | None = None
    starts: int = 0
    failures: int = 0
    says_ready: bool = False
    heard_s: float = 0.0
    takers: frozenset[int] = frozenset()
    acceptors: frozenset[int] = frozenset()
    activity: int = 0
    acted: bool = False
    rest: Rest | None = None
    cpu_s: float = 0.0
    cpu_at_s: float = 0.0
    hung: bool = False
    full: bool = False
    shed: bool = False
    queued: int = 0
    replace_not_before_s: float = 0.0
    left: dict[int, Departure] = {}
    is_apart: bool = False
    others: set[int] = set()
    said: str = ""
    timer: Timer | None = None
    drain: Cancellable | None = None
    error: SteerError | None = None

    @property
    def serves(self) -> bool:
        """Whether it may be selected."""
        return self.is_in_service and not self.shed

    @property
    def is_in_service(self) -> bool:
        """Whether it may be selected, or could be if it were not at capacity."""
        return self.state is State.READY and not self.held and not self.leaving

    @property
    def is_on_its_way_out(self) -> bool:
        """Whether it only finishes what it has."""
        return self.leaving or self.state is State.STOPPING

    @property
    def closed_its_listeners(self) -> bool:
        return Departure.CLOSED in self.left.values()

    @property
    def asks_to_be_taken_for_hung(self) -> bool:
        """By WATCHDOG=trigger, see sd_notify(3)."""
        return self.heard_s == -math.inf

    @property
    def hangs(self) -> bool:
        return self.state is State.HUNG

    def member(self, spec: WorkerSpec | None = None) -> Member:
        """What the table is told of it, on its seat or on another."""
        spec = spec or self.spec
        return Member(self.slot, spec.weight, spec.cpu)

    def reseat(self, spec: WorkerSpec) -> bool:
        """Give it another seat; whether it is to be pinned to other CPUs."""
        before, self.spec = self.spec, spec
        return before.cpus != spec.cpus

    def pin(self) -> None:
        """Pin its processes to the CPUs of its seat."""
        if self.process:
            priority.pin(processes.descendants(self.process.pid), self.spec.cpus)

    def hear(self, message: Mapping[str, str], now_s: float) -> None:
        """Take what it says of itself, see sd_notify(3)."""
        self.said = message.get("STATUS", self.said)
        if message.get("WATCHDOG") == "1":
            self.heard_s = now_s
        elif message.get("WATCHDOG") == "trigger":
            self.heard_s = -math.inf

    def got_ready(self, now_s: float) -> None:
        """Look at what can be seen of its process only now. From here on it need not be modest."""
        self.ready_s = self.ready_s or time.monotonic()
        self.heard_s = now_s
        self.full = self.shed = False
        if self.process:
            with suppress(KernelError):
                self.others = processes.open_sockets(self.process.pid)
            self.takers = waiters(self.process.pid, self.process.inodes)
            self.acceptors = acceptors(self.process.pid, self.process.inodes)
            if self.process.launch.modest:
                priority.hurry(processes.descendants(self.process.pid))

    def lost_process(self) -> None:
        """Its process has ended. If it had served for long, it begins a new row of failures."""
        self.process = None
        self.says_ready = self.full = self.shed = False
        self.rest = None
        self.left = {}
        self.replace_not_before_s = 0.0
        served_s = time.monotonic() - self.ready_s if self.ready_s is not None else 0.0
        self.failures = 1 if served_s >= STABLE_S else self.failures + 1

    def has_acted(self) -> bool:
        """Whether those who take its connections did anything since this was last asked."""
        before = self.activity
        if self.process:
            self.activity = activity(self.process.pid, among=self.takers)
        return self.activity != before

    def has_computed(self, now_s: float) -> bool:
        """Whether it had the CPU since this was last asked, for more than to look at a clock: a
        worker that is told to end may be woken again and again for nothing else. One that waits
        for a CPU computes, too: on a machine with too much to do it may get none for long."""
        before, before_s = self.cpu_s, self.cpu_at_s
        self.cpu_s, self.cpu_at_s = 0.0, now_s
        if self.process:
            self.cpu_s = cpu_s(self.process.pid)
        waits_for_cpu = self.process is not None and is_runnable(self.process.pid)
        return waits_for_cpu or is_busy(self.cpu_s - before, now_s - before_s)

    def rested_s(self, now_s: float) -> float:
        """For how long it has been at rest, as far as it was asked for."""
        assert self.process
        self.rest = self.rest or Rest()
        pid = self.process.pid
        return self.rest.lasted_s(now_s, cpu_s(pid), is_asleep(pid))

    def set_timer(self, timer: Timer) -> None:
        """Let it wait for this, and not for what it waited for before."""
        self.cancel_timer()
        self.timer = timer

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def cancel_drain(self) -> None:
        if self.drain is not None:
            self.drain.cancel()
            self.drain = None


def waits(process: WorkerProcess) -> Seen:
    """Whether it waits on its sockets."""
    return waits_on(process.pid, process.inodes)
