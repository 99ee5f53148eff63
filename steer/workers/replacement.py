"""Starting workers that replace others, and retiring the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from steer.errors import SteerError
from steer.workers.handle import WorkerHandle
from steer.workers.lifecycle import Event
from steer.workers.publisher import Publisher
from steer.workers.spares import Spares
from steer.workers.starter import Starter
from steer.workers.steps import InSteps
from steer.workers.transitions import Transitions


class Replacement:
    """Replaces workers: all new ones enter the table in one publication, and all old ones leave it.

    Args:
        forget: drops a worker from the pool.
        retiring: reports RETIRE for workers, in steps.
    """

    def __init__(
        self,
        publisher: Publisher,
        starter: Starter,
        transitions: Transitions,
        spares: Spares,
        forget: Callable[[WorkerHandle], None],
        retiring: InSteps,
    ) -> None:
        self._publisher = publisher
        self._starter = starter
        self._transitions = transitions
        self._spares = spares
        self._forget = forget
        self._retiring = retiring

    def start(self, workers: Iterable[WorkerHandle]) -> Sequence[WorkerHandle]:
        """Start all of these held workers, or none.

        Args:
            workers: new workers; iterating over them makes them.

        Raises:
            BindError, KernelError, WorkersFailed: one could not be started.
            ControlError: there are more workers than slots.
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
        """These workers are held no longer, and enter the table together."""
        for worker in workers:
            worker.held, worker.on_outcome = False, None
        self._publisher.soon()

    def retire(self, workers: Iterable[WorkerHandle]) -> None:
        """These workers leave the table together, and are retired in steps. A controller that
        adopts the service meanwhile retires those whose spec another worker has."""
        leaving = []
        for worker in workers:
            if worker.is_in_service:
                worker.leaving = True
                leaving.append(worker)
            else:
                self._transitions.report(worker, Event.RETIRE)
        self._publisher.soon()
        self._retiring.begin_soon(leaving)
        # Not before, as an activated spare must not take the place of one that is retired.
        self._spares.replace_failed()
