"""Taking workers from state to state: an event is reported, and its commands are carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from steer.errors import SteerError
from steer.linux.retry import Retry
from steer.workers import lifecycle
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Command, Event, State
from steer.workers.shutdown import Shutdown
from steer.workers.startup import Startup

CommandTable = Mapping[Command, Callable[[WorkerHandle], None]]


class Transitions:
    """Does what `lifecycle` decides.

    Args:
        workers: all workers of the pool.
        entries: saves each worker whose state may have changed.
        changed: called with each worker whose state has changed.

    Attributes:
        commands: how each command is carried out. Set before the first event.
        on_started: called when a worker has left the state STARTING.
    """

    def __init__(
        self,
        workers: Collection[WorkerHandle],
        entries: GuardEntries,
        shutdown: Shutdown,
        retry: Retry,
        changed: Callable[[WorkerHandle], None],
    ) -> None:
        self._workers = workers
        self._entries = entries
        self._shutdown = shutdown
        self._retry = retry
        self._changed = changed
        self.commands: CommandTable = {}
        self.on_started: Callable[[], None] = lambda: None

    def report(self, worker: WorkerHandle, event: Event) -> None:
        """Take the worker to its next state, and carry out what follows."""
        if event is Event.READY and worker.process and worker.process.problem:
            return  # it is about to end
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

    def report_until_done(self, worker: WorkerHandle, event: Event) -> None:
        """Report the event. If that fails, try again as long as the worker exists."""
        act = f"worker {worker.slot}: {event.value}"
        wanted = partial(self._workers.__contains__, worker)
        self._retry.until_done(act, partial(self.report, worker, event), wanted)

    def _carry_out(self, worker: WorkerHandle, command: Command, state: State) -> None:
        """If the command fails, try again as long as the worker is in this state."""
        self._retry.until_done(
            f"worker {worker.slot}: {command.value}",
            partial(self.commands[command], worker),
            wanted=lambda: worker.state is state and worker in self._workers,
        )


class Failures:
    """Reports workers that have no process: it ended, or could not be started."""

    def __init__(self, transitions: Transitions, startup: Startup) -> None:
        self._transitions = transitions
        self._startup = startup

    def ended(self, worker: WorkerHandle, error: SteerError) -> None:
        """Its process has ended, for this reason."""
        worker.error = error
        report = self._transitions.report
        if worker.held:
            # It is not started again: whoever requested it decides.
            report(worker, Event.RETIRE)
            report(worker, Event.EXITED)
            if worker.on_outcome:
                worker.on_outcome(worker)
            return
        if worker.leaving:
            report(worker, Event.RETIRE)
        report(worker, Event.EXITED)
        self._startup.fail(error)

    def not_started(self, worker: WorkerHandle, error: SteerError) -> None:
        """No process could be started for it, for this reason."""
        worker.failures += 1
        self.ended(worker, error)
