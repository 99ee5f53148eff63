"""One worker of a service: its slot, its state, its process, and what has been seen of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import msgspec

from steer.backends.membership import Departure
from steer.config.address import Bind
from steer.config.plan import Generation, WorkerSpec
from steer.config.service import Service
from steer.errors import KernelError, SteerError
from steer.linux import priority, processes
from steer.linux.activity import activity, cpu_s, is_asleep, is_runnable
from steer.linux.waiting import Seen, acceptors, waiters, waits_on
from steer.policy.layout import Member
from steer.workers import own_listeners
from steer.workers.hang import Rest, is_busy
from steer.workers.lifecycle import STABLE_S, State
from steer.workers.process import WorkerProcess

if TYPE_CHECKING:
    from steer.workers.clock import Timer


class Cancellable(Protocol):
    """Something under way for a worker that may be cancelled."""

    def cancel(self) -> None: ...


class WorkerHandles:
    """All workers of a service, in the order in which they were added.

    Attributes:
        by_pid: workers with a process, by the process id of its first process.
    """

    def __init__(self) -> None:
        self._handles: dict[WorkerHandle, None] = {}
        self.by_pid: dict[int, WorkerHandle] = {}

    def __iter__(self) -> Iterator[WorkerHandle]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, worker: object) -> bool:
        return worker in self._handles

    def add(self, worker: WorkerHandle) -> None:
        """Append the worker."""
        self._handles[worker] = None

    def remove(self, worker: WorkerHandle) -> None:
        """Raises KeyError: there is no such worker."""
        del self._handles[worker]

    def of_pid(self, pid: int) -> WorkerHandle | None:
        """The worker whose first process has this id."""
        worker = self.by_pid.get(pid)
        is_current = worker and worker.process and worker.process.pid == pid
        return worker if is_current else None

    def sort(self, key: Callable[[WorkerHandle], tuple[int, int]]) -> None:
        """Reorder the workers by this key."""
        self._handles = dict.fromkeys(sorted(self._handles, key=key))


class WorkerHandle(msgspec.Struct, eq=False):
    """One worker: its process, or the wait for the next one.

    Args:
        held: not selected yet: it will be activated together with others.
        change: the number of the change for which it is held, or was.
        niced: runs at a lower priority until it is ready, so that other workers have the CPUs.
        leaving: not selected any more, and about to be retired together with others.
        on_outcome: called when a held worker is ready, and when it has failed.
        failures: how often its process ended in a row before it had served `lifecycle.STABLE_S`.
        says_ready: whether it sent READY=1.
        heartbeat_s: when it last sent WATCHDOG=1, or became ready, by the controller's clock.
        accepting_pids: its processes that were seen to wait on its sockets.
        accepting_tids: its threads that were seen to wait on its sockets.
        activity: the activity of `accepting_pids` at the last look, see `linux.activity`.
        acted_since_hung: whether `accepting_pids` did anything since it was found hung.
        rest: how long it has been at rest, if it is starting and may not be inspected.
        cpu_s, cpu_at_s: its CPU time at the last look, and when that was.
        was_hung: whether it was hung when it was retired.
        at_capacity: it accepts nothing, and makes progress with the connections it has.
        excluded: not selected because it is at capacity and others have room.
        queued: connections in its accept queues at the last look.
        replace_not_before_s: no replacement for it is requested before this time.
        asks_replacement: whether it sent X_STEER_REPLACE=1.
        departures: by bind, why its socket is not in the group as it should be.
        is_apart: its UDP socket joined another group when it started; see `health.split`.
        initial_sockets: inodes of the sockets it had open when it became ready. Sockets it opens
            later may be connections.
        status_text: what it sent as STATUS=.
        error: why there is no process.
    """

    spec: WorkerSpec
    slot: int
    generation: Generation
    state: State = State.STARTING
    held: bool = False
    change: int = 0
    niced: bool = False
    leaving: bool = False
    on_outcome: Callable[[WorkerHandle], None] | None = None
    process: WorkerProcess | None = None
    ready_s: float | None = None
    starts: int = 0
    failures: int = 0
    says_ready: bool = False
    heartbeat_s: float = 0.0
    accepting_pids: frozenset[int] = frozenset()
    accepting_tids: frozenset[int] = frozenset()
    activity: int = 0
    acted_since_hung: bool = False
    rest: Rest | None = None
    cpu_s: float = 0.0
    cpu_at_s: float = 0.0
    was_hung: bool = False
    at_capacity: bool = False
    excluded: bool = False
    queued: int = 0
    replace_not_before_s: float = 0.0
    asks_replacement: bool = False
    departures: dict[int, Departure] = {}
    is_apart: bool = False
    initial_sockets: set[int] = set()
    status_text: str = ""
    timer: Timer | None = None
    drain: Cancellable | None = None
    error: SteerError | None = None

    @property
    def serves(self) -> bool:
        """Whether it may be selected."""
        return self.is_in_service and not self.excluded

    @property
    def is_in_service(self) -> bool:
        """Whether it may be selected, or is only excluded while it is at capacity."""
        return self.is_settled and not self.spec.is_spare

    @property
    def is_ready_spare(self) -> bool:
        """Whether it can take the place of another worker."""
        return self.is_settled and self.spec.is_spare

    @property
    def is_settled(self) -> bool:
        """Whether it is ready, and no change is about to activate or retire it."""
        return self.state is State.READY and not self.held and not self.leaving

    @property
    def is_retiring(self) -> bool:
        """Whether it gets nothing new and finishes what it has."""
        return self.leaving or self.state is State.STOPPING

    @property
    def closed_its_listeners(self) -> bool:
        return Departure.CLOSED in self.departures.values()

    @property
    def has_triggered_watchdog(self) -> bool:
        """Whether it asked to be treated as hung, by WATCHDOG=trigger (sd_notify(3))."""
        return self.heartbeat_s == -math.inf

    @property
    def service(self) -> Service:
        """The configuration of its generation."""
        return self.generation.plan.service

    @property
    def binds(self) -> Sequence[Bind]:
        """The binds of its generation."""
        return self.generation.plan.binds

    @property
    def is_hung(self) -> bool:
        return self.state is State.HUNG

    def member(self, spec: WorkerSpec | None = None) -> Member:
        """The worker as a member of the table, with its own spec or another."""
        spec = spec or self.spec
        return Member(self.slot, spec.weight, spec.cpu)

    def change_spec(self, spec: WorkerSpec) -> bool:
        """Change its spec. Returns whether it has to be pinned to other CPUs."""
        before, self.spec = self.spec, spec
        return before.cpus != spec.cpus

    def pin(self) -> None:
        """Pin its processes to the CPUs of its spec."""
        if self.process:
            priority.pin(processes.descendants(self.process.pid), self.spec.cpus)

    def store_notification(self, message: Mapping[str, str], now_s: float) -> None:
        """Store what it says in a notification, see sd_notify(3)."""
        self.status_text = message.get("STATUS", self.status_text)
        if message.get("WATCHDOG") == "1":
            self.heartbeat_s = now_s
        elif message.get("WATCHDOG") == "trigger":
            self.heartbeat_s = -math.inf
        if message.get("X_STEER_REPLACE") == "1":
            self.asks_replacement = True

    def got_ready(self, now_s: float) -> None:
        """Record what can be seen of its process once it is ready, and end its lower priority."""
        self.ready_s = self.ready_s or time.monotonic()
        self.heartbeat_s = now_s
        self.at_capacity = self.excluded = False
        if self.process:
            with suppress(KernelError):
                self.initial_sockets = processes.open_sockets(self.process.pid)
            self.accepting_pids = waiters(self.process.pid, self.process.inodes)
            self.accepting_tids = acceptors(self.process.pid, self.process.inodes)
            if self.process.launch.niced:
                priority.renice(processes.descendants(self.process.pid))

    def lost_process(self) -> None:
        """Its process has ended. If it had served for long, failures are counted from one again."""
        self.process = None
        self.says_ready = self.at_capacity = self.excluded = self.asks_replacement = False
        self.rest = None
        self.departures = {}
        self.replace_not_before_s = 0.0
        served_s = time.monotonic() - self.ready_s if self.ready_s is not None else 0.0
        self.failures = 1 if served_s >= STABLE_S else self.failures + 1

    def has_acted(self) -> bool:
        """Whether the processes that accept its connections did anything since the last call."""
        before = self.activity
        if self.process:
            self.activity = activity(self.process.pid, among=self.accepting_pids)
        return self.activity != before

    def has_computed(self, now_s: float) -> bool:
        """Whether it used more CPU time since the last call than timers take. A worker that was
        told to finish may be woken by timers again and again. One that waits for a CPU counts as
        computing: on an overloaded machine it may wait for long."""
        before, before_s = self.cpu_s, self.cpu_at_s
        self.cpu_s, self.cpu_at_s = 0.0, now_s
        if self.process:
            self.cpu_s = cpu_s(self.process.pid)
        waits_for_cpu = self.process is not None and is_runnable(self.process.pid)
        return waits_for_cpu or is_busy(self.cpu_s - before, now_s - before_s)

    def rested_s(self, now_s: float) -> float:
        """For how long it has been at rest, as far as earlier calls saw."""
        assert self.process
        self.rest = self.rest or Rest()
        pid = self.process.pid
        return self.rest.lasted_s(now_s, cpu_s(pid), is_asleep(pid))

    def set_timer(self, timer: Timer) -> None:
        """Replace the timer it waits for."""
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
    """Whether a process of the worker waits on the worker's sockets."""
    if process.launch.service.adopts:
        return own_listeners.waits(process)
    return waits_on(process.pid, process.inodes)
