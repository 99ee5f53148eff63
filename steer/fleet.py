"""The workers of a service: started, watched, started again, ended.

What follows from what is in `lifecycle`; here are the clocks and the processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from steer import lifecycle
from steer.errors import AppLoadError, SteerError, WorkersFailed
from steer.kernel import proc, sockets
from steer.kernel.guard import Guard
from steer.kernel.proc import Seen
from steer.kernel.process import how_it_ended, pause
from steer.lifecycle import Command, Event, State
from steer.log import Log
from steer.plan import Seat
from steer.spawn import Process
from steer.steering import Counts, Steering
from steer.table import Member
from steer.worker import Launch

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Handle, TimerHandle

QUICK_S = 1.0
"""How long a quick stop waits between SIGTERM and SIGKILL."""
_LOOK_FIRST_S, _LOOK_LAST_S = 0.01, 0.25
"""How often a worker that does not notify is looked at: often at first, then less."""


class Place(msgspec.Struct, eq=False):
    """A seat and who is in it: a process, or the wait for the next one.

    Args:
        failures: ends in a row before `lifecycle.STABLE_S` of service.
        says_ready: whether it sent READY=1.
        error: why there is no process.
    """

    seat: Seat
    slot: int
    state: State = State.STARTING
    process: Process | None = None
    ready_s: float | None = None
    starts: int = 0
    failures: int = 0
    says_ready: bool = False
    timer: TimerHandle | None = None
    error: SteerError | None = None


class Fleet:
    """All workers of one service.

    First `start`, then `watch` in a running loop: what it takes to have a loop is
    imported while the workers already start.

    Args:
        seats: one worker for each.
        slots: capacity; a worker's slot is below it.
        guard: is told which processes are workers.
        launch: makes a worker's instructions from its seat and slot.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        slots: int,
        steering: Steering,
        guard: Guard,
        launch: Callable[[Seat, int], Launch],
        log: Log,
    ) -> None:
        self.places = [Place(seat, slot) for slot, seat in enumerate(seats)]
        self.retired = Counts()
        self._slots = slots
        self._next_slot = len(seats)
        self._steering = steering
        self._guard = guard
        self._launch = launch
        self._log = log
        self._look_s = _LOOK_FIRST_S
        self._looking: TimerHandle | None = None
        self._flip_due: Handle | None = None
        self._ending = False
        self._loop: AbstractEventLoop
        self.up: Future[None]
        self.ended: Future[None]

    def start(self, holds_ports: Callable[[], None]) -> None:
        """Start every worker.

        Args:
            holds_ports: called when a worker has bound all addresses.

        Raises:
            BindError: an address cannot be had.
            KernelError: the kernel refuses processes, or sockets in the group.
            SystemExit: a signal says to end.
        """
        for place in self.places:
            pause(0)
            try:
                self._spawn(place)
                holds_ports()
            except WorkersFailed as error:
                # Like one that ends later: the others start, and it is tried again.
                place.error = error

    def watch(self, loop: AbstractEventLoop) -> None:
        """Look after the workers from here on.

        `up` is then done when the first is ready; or holds AppLoadError if the
        application cannot be loaded, WorkersFailed if all failed before. `ended` is
        done when all have ended after `stop`.
        """
        self._loop = loop
        self.up = loop.create_future()
        self.ended = loop.create_future()
        for place in self.places:
            if place.process is not None:
                self._watch(place, place.process)
            elif place.error is not None:
                place.failures += 1
                self._failed(place, place.error)

    def abandon(self) -> None:
        """Leave no process, whatever happened."""
        for place in self.places:
            if place.process is not None:
                place.process.end()
                place.process = None

    def stop(self) -> None:
        """Ask every worker to finish what it has."""
        self._ending = True
        for place in self.places:
            self.report(place, Event.STOP)
        self._steering.release()
        if not self.up.done():
            self.up.set_result(None)

    def overdue_in(self, after_s: float) -> None:
        """Kill what is still there then."""
        for place in self.places:
            if place.process is not None:
                self._set_timer(place, after_s, Event.OVERDUE)

    def notified(self, pid: int) -> None:
        """The process `pid`, or one that it descends from, says that it is ready.

        A command is looked at all the same: gunicorn says so before its workers have
        loaded the application.
        """
        for place in self.places:
            starting = place.state is State.STARTING and place.process
            if starting and proc.is_descendant(pid, starting.pid):
                place.says_ready = True
                is_callable = not starting.launch.service.command
                if is_callable or _waits(starting) is not Seen.NO:
                    self.report(place, Event.READY)

    def report(self, place: Place, event: Event) -> None:
        """Something happened to a worker: do what follows."""
        if event is Event.LATE and place.says_ready:
            event = Event.READY  # it waits in a way that is not seen
        if event in (Event.LATE, Event.OVERDUE):
            self._log.warning("worker %d: %s", place.slot, event.value)
        place.state, commands = lifecycle.step(place.state, event)
        for command in commands:
            _DO[command](self, place)

    def settle(self) -> None:
        """Have who is said to be ready in the table by now."""
        if self._flip_due is not None:
            self._steer()

    def counts(self) -> Counts | None:
        """Of the whole service since its start; None where nobody counts."""
        now = [self._steering.counts(place.slot) for place in self.places]
        if any(count is None for count in now):
            return None
        return sum((count for count in now if count is not None), self.retired)

    # Commands.

    def _start_again(self, place: Place) -> None:
        self._take_slot(place)
        try:
            self._watch(place, self._spawn(place))
        except SteerError as error:
            self._log.error("%s", error)
            place.failures += 1
            self._failed(place, error)

    def _activate(self, place: Place) -> None:
        place.ready_s = time.monotonic()
        self._cancel_timer(place)
        self._log.info("worker %d ready", place.slot)
        # Together with others that get ready in the same turn of the loop.
        if self._flip_due is None:
            self._flip_due = self._loop.call_soon(self._steer)
        if not self.up.done():
            self.up.set_result(None)

    def _deactivate(self, _place: Place) -> None:
        if not self._ending:
            self._steer()

    def _terminate(self, place: Place) -> None:
        if place.process:
            place.process.terminate()

    def _kill(self, place: Place) -> None:
        if not place.process:
            return
        if place.state is State.STARTING:
            limit_s = place.process.launch.service.ready_timeout
            place.process.problem = WorkersFailed(
                "start workers",
                f"not ready within {limit_s:g} s",
                "see --ready-timeout; ready is who says READY=1 or waits on its socket",
                detail=place.process.last_words,
            )
        place.process.kill()

    def _back_off(self, place: Place) -> None:
        after_s = lifecycle.backoff_s(place.failures)
        if after_s:
            self._log.warning("worker %d failed again; another in %g s", place.slot, after_s)
        self._set_timer(place, after_s, Event.RETRY)

    def _forget(self, place: Place) -> None:
        self._cancel_timer(place)
        if all(each.state is State.GONE for each in self.places):
            self.ended.set_result(None)

    # What happens to workers.

    def _spawn(self, place: Place) -> Process:
        """Start a process. Raises BindError, KernelError, WorkersFailed."""
        place.starts += 1
        launch = self._launch(place.seat, place.slot)
        if not any(each.process for each in self.places):
            # Nobody of ours keeps the ports: somebody else may be there by now.
            for bind in launch.binds:
                sockets.check_free(bind)
        place.process = Process(
            launch,
            self._guard,
            lambda fds: self._steering.joined(place.slot, fds),
        )
        return place.process

    def _watch(self, place: Place, process: Process) -> None:
        place.says_ready = False
        process.watch(self._loop, lambda gone, status: self._on_end(place, gone, status))
        self._set_timer(place, process.launch.service.ready_timeout, Event.LATE)
        self._look_s = _LOOK_FIRST_S
        self._look_soon()

    def _take_slot(self, place: Place) -> None:
        """A slot that nobody has, the next one round; what the old one counted is put aside.

        Not the old one again: what still speaks of that means the worker that died.
        """
        self.retired += self._steering.retire(place.slot) or Counts()
        taken = {each.slot for each in self.places}
        while self._next_slot in taken:
            self._next_slot = (self._next_slot + 1) % self._slots
        place.slot = self._next_slot
        self._next_slot = (self._next_slot + 1) % self._slots

    def _on_end(self, place: Place, process: Process, status: int) -> None:
        self._cancel_timer(place)
        self._steering.left(place.slot)
        place.process = None
        served_s = time.monotonic() - place.ready_s if place.ready_s is not None else 0.0
        place.ready_s = None
        place.failures = 1 if served_s >= lifecycle.STABLE_S else place.failures + 1
        if not self._ending:
            self._log.warning(
                "worker %d (pid %d): %s", place.slot, process.pid, how_it_ended(status)
            )
            if process.problem and self.up.done():
                self._log.error("%s", process.problem)
        error = process.problem or WorkersFailed(
            "start workers", how_it_ended(status), detail=process.last_words
        )
        self._failed(place, error)

    def _failed(self, place: Place, error: SteerError) -> None:
        """Whether the service can still come up; `error` is told if it cannot."""
        self.report(place, Event.EXITED)
        if self.up.done() or self._ending:
            return
        if isinstance(error, AppLoadError) or all(each.failures for each in self.places):
            self.up.set_exception(error)
            self.up.exception()  # retrieved here: nobody may be waiting yet

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = self._loop.call_later(self._look_s, self._look)

    def _look(self) -> None:
        """See which workers wait on their sockets by now."""
        self._looking = None
        for place in self.places:
            process = place.process if place.state is State.STARTING else None
            if process and _waits(process) is Seen.YES:
                self.report(place, Event.READY)
        if any(place.state is State.STARTING for place in self.places):
            self._look_s = min(self._look_s * 1.5, _LOOK_LAST_S)
            self._look_soon()

    def _steer(self) -> None:
        if self._flip_due is not None:
            self._flip_due.cancel()
            self._flip_due = None
        self._steering.steer(
            [
                Member(place.slot, place.seat.weight, place.seat.cpu)
                for place in self.places
                if place.state is State.READY
            ]
        )

    # Clocks.

    def _set_timer(self, place: Place, after_s: float, event: Event) -> None:
        self._cancel_timer(place)
        place.timer = self._loop.call_later(after_s, self.report, place, event)

    def _cancel_timer(self, place: Place) -> None:
        if place.timer is not None:
            place.timer.cancel()
            place.timer = None


def _waits(process: Process) -> Seen:
    return proc.waits_on(process.pid, process.inodes)


_DO: dict[Command, Callable[[Fleet, Place], None]] = {
    Command.SPAWN: Fleet._start_again,
    Command.ACTIVATE: Fleet._activate,
    Command.DEACTIVATE: Fleet._deactivate,
    Command.TERMINATE: Fleet._terminate,
    Command.KILL: Fleet._kill,
    Command.BACK_OFF: Fleet._back_off,
    Command.FORGET: Fleet._forget,
}
