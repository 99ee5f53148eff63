"""Starting workers that are to replace others, and retiring those others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from steer.errors import SteerError
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Event
from steer.workers.selection import Selection
from steer.workers.starter import Starter
from steer.workers.steps import InSteps
from steer.workers.transitions import Transitions


class Replacement:
    """Replaces workers: several at once enter the table, and several leave it.

    Args:
        forget: drops a worker that could not be started.
        retiring: retires workers in steps.
    """

    def __init__(
        self,
        selection: Selection,
        starter: Starter,
        transitions: Transitions,
        forget: Callable[[WorkerHandle], None],
        retiring: InSteps,
    ) -> None:
        self._selection = selection
        self._starter = starter
        self._transitions = transitions
        self._forget = forget
        self._retiring = retiring

    def start(self, workers: Iterable[WorkerHandle]) -> Sequence[WorkerHandle]:
        """Start all of these workers, which are held, or none.

        Args:
            workers: new ones, made as they are taken from here.

        Raises:
            BindError, KernelError, WorkersFailed: one could not be started.
            ControlError: there are too many.
        """
        taken: list[WorkerHandle] = []
        try:
            for worker in workers:
                taken.append(worker)
            self._starter.start(*taken)
        except SteerError:
            for worker in taken:
                self._forget(worker)
            raise
        return taken

    def activate(self, workers: Iterable[WorkerHandle]) -> None:
        """These are held no longer, and enter the table all at once."""
        for worker in workers:
            worker.held, worker.on_outcome = False, None
        self._selection.publish_soon()

    def retire(self, workers: Iterable[WorkerHandle]) -> None:
        """They leave the table all at once. What follows is done in steps. A controller that
        adopts the workers meanwhile retires those whose seats others have."""
        leaving = []
        for worker in workers:
            if worker.is_in_service:
                worker.leaving = True
                leaving.append(worker)
            else:
                self._transitions.report(worker, Event.RETIRE)
        self._selection.publish_soon()
        self._retiring.begin_soon(leaving)
