"""Taking workers from state to state: an event is reported, and the commands that follow from it
are carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from steer.errors import SteerError
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.waiting import Seen
from steer.workers import elsewhere, lifecycle
from steer.workers.clock import Clock
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle, waits
from steer.workers.lifecycle import Command, Event, State
from steer.workers.shutdown import Shutdown
from steer.workers.startup import Startup
from steer.workers.visibility import WAITS, Visibility

CommandTable = Mapping[Command, Callable[[WorkerHandle], None]]


class Transitions:
    """Carries out what `lifecycle` decides.

    Args:
        workers: all workers there are.
        entries: told of each worker that may be in another state.
        changed: told of a worker that is in another state.
        graceful_timeout_s: how long a worker may take to finish, as configured now.

    Attributes:
        commands: how each command is carried out; set before the first event.
        on_started: called when a worker is not starting any more.
    """

    def __init__(
        self,
        workers: Collection[WorkerHandle],
        startup: Startup,
        shutdown: Shutdown,
        entries: GuardEntries,
        visibility: Visibility,
        clock: Clock,
        log: Log,
        retry: Retry,
        changed: Callable[[WorkerHandle], None],
        graceful_timeout_s: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._startup = startup
        self._shutdown = shutdown
        self._entries = entries
        self._visibility = visibility
        self._clock = clock
        self._log = log
        self._retry = retry
        self._changed = changed
        self._graceful_timeout_s = graceful_timeout_s
        self.commands: CommandTable = {}
        self.on_started: Callable[[], None] = lambda: None

    def report(self, worker: WorkerHandle, event: Event) -> None:
        """Something happened to a worker: do what follows."""
        if event is Event.LATE and self._may_be_ready(worker):
            event = Event.READY
        if event is Event.READY and worker.process and worker.process.problem:
            return  # it is about to end
        if event is Event.OVERDUE and self._is_busy(worker):
            self.report_later(worker, self._graceful_timeout_s(), event)
            return
        is_told_by_others = worker.held or not self._startup.has_succeeded
        if event is Event.OVERDUE or (event is Event.LATE and not is_told_by_others):
            self._log.warning("worker %d: %s", worker.slot, event.value)
        before = worker.state
        worker.was_hung |= worker.is_hung and event is Event.RETIRE
        worker.state, commands = lifecycle.step(before, event)
        for command in commands:
            self._carry_out(worker, command, worker.state)
        if not self._shutdown.has_begun:  # else nobody is to adopt it
            self._entries.save_soon(worker)
        if worker.state is not before:
            self._changed(worker)
            if before is State.STARTING:
                self.on_started()

    def report_later(self, worker: WorkerHandle, after_s: float, event: Event) -> None:
        """Report it after so long, unless the worker is to wait for something else by then."""
        timer = self._clock.call_later(after_s, self.report_until_done, worker, event)
        worker.set_timer(timer)

    def report_until_done(self, worker: WorkerHandle, event: Event) -> None:
        """Report it, and if that fails again as long as there is such a worker."""
        act = f"worker {worker.slot}: {event.value}"
        wanted = partial(self._workers.__contains__, worker)
        self._retry.until_done(act, partial(self.report, worker, event), wanted)

    def fail(self, worker: WorkerHandle, error: SteerError) -> None:
        """The worker has no process, by this error: it has ended, or could not be started."""
        worker.error = error
        if worker.held:
            # It is not tried again: whoever asked for it is told.
            self.report(worker, Event.RETIRE)
            self.report(worker, Event.EXITED)
            if worker.on_outcome:
                worker.on_outcome(worker)
            return
        if worker.leaving:
            self.report(worker, Event.RETIRE)
        self.report(worker, Event.EXITED)
        self._startup.fail(error)

    def _carry_out(self, worker: WorkerHandle, command: Command, state: State) -> None:
        """Now, and where that fails again, as long as the worker is in this state."""
        self._retry.until_done(
            f"worker {worker.slot}: {command.value}",
            partial(self.commands[command], worker),
            wanted=lambda: worker.state is state and worker in self._workers,
        )

    def _may_be_ready(self, worker: WorkerHandle) -> bool:
        """Whether it may wait for connections in a way that is not seen."""
        if self._is_unseen(worker):
            return True
        is_elsewhere = worker.process and elsewhere.diagnosis(worker.process)
        return worker.says_ready and not is_elsewhere

    def _is_unseen(self, worker: WorkerHandle) -> bool:
        """Whether it cannot be seen if it waits on its sockets."""
        if worker.process is None or waits(worker.process) is not Seen.UNKNOWN:
            return False
        self._visibility.refused(WAITS, worker.process)
        return True

    def _is_busy(self, worker: WorkerHandle) -> bool:
        """Whether one that was retired as hung may still be at a request that takes long."""
        if not worker.was_hung or self._shutdown.has_begun:
            return False
        return worker.has_computed(self._clock.now_s())
