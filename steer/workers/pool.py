"""The workers of a service: started, watched, started again, ended.

What follows from what is in `lifecycle`; here are the clocks and the processes.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from steer.backends.base import Backend, Counts
from steer.child.launch import Launch
from steer.config.plan import Generation, Plan, WorkerSpec
from steer.config.service import Service
from steer.control.notify import Unheard
from steer.errors import SteerError
from steer.guard.client import Entry, GuardClient
from steer.linux import family, fork
from steer.linux.log import Log
from steer.linux.retry import Retry, as_refusal
from steer.linux.waiting import Seen
from steer.workers import elsewhere, lifecycle, notifications, selection
from steer.workers.clock import Clock
from steer.workers.ended import EndedWorkers
from steer.workers.ends import Ends
from steer.workers.guard_entries import GuardEntries
from steer.workers.handle import Cancellable, Saved, WorkerHandle, WorkerHandles, waits
from steer.workers.intake import Lot
from steer.workers.lifecycle import Command, Event, State
from steer.workers.looks import Looks
from steer.workers.migration import QueueMigration
from steer.workers.notifications import Notifications
from steer.workers.process import WorkerProcess
from steer.workers.queues import Queues
from steer.workers.selection import Selection
from steer.workers.shutdown import Shutdown
from steer.workers.socket_removal import SocketRemoval
from steer.workers.spawner import Spawner
from steer.workers.start_queue import StartQueue
from steer.workers.startup import Startup
from steer.workers.steps import InSteps
from steer.workers.visibility import WAITS, Visibility

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future


QUICK_S = 1.0
"""How long a quick stop waits between SIGTERM and SIGKILL."""

ALL_START_S = 1.0
"""So long after the first commands all others start, whatever becomes of those."""


_FIRST_AT_MOST = 16
"""Before there is a loop, where there are CPUs for so many."""


Settle = Callable[[WorkerHandle], Cancellable]
"""Has it looked whether anything waits for a worker, until nothing does, that reported, and that
it stays so."""


class WorkerPool:
    """All workers of one service.

    First `start` or `adopt`, then `watch` in a running loop: what it takes to have a loop
    is imported while the workers already start.

    Args:
        generation: the first.
        slots: capacity; a worker's slot is below it.
        guard: has all that another controller needs.
        launch: makes a worker's instructions.
        retry: does what has to go on.
        unheard: is told who says to be ready and is of no worker.

    Attributes:
        generation: the one in force; a place may be of an earlier one, and on its way out.
        admitted: the number of the last change whose workers may be chosen.
        by_pid: places with a process, by the process id of its first.
        is_watched: whether there is a loop to look after them in.
        clock: what workers are given time for goes by it.
        looks: what is looked at again and again, at its beats.
        lot: how many start in one turn of the loop.
        queues: what waits at workers.
        visibility: what of workers cannot be seen.
        group_notes: on sockets that left their groups, see `groups`.
    """

    def __init__(
        self,
        generation: Generation,
        slots: int,
        steering: Backend,
        guard: GuardClient,
        launch: Callable[[WorkerHandle], Launch],
        log: Log,
        retry: Retry,
        unheard: Unheard,
    ) -> None:
        self.generation = generation
        self.admitted = 0
        self.places = WorkerHandles()
        self.by_pid: dict[int, WorkerHandle] = {}
        self._selection = Selection(steering, self.places, slots, guard, log, retry)
        self._shutdown = Shutdown(self.places, retry)
        self.log = log
        self.retry = retry
        self.clock = Clock()
        self.looks = Looks(self.clock, retry)
        self.lot = Lot()
        self.queues = Queues()
        self.visibility = Visibility(log)
        self._migration = QueueMigration(
            self._selection, self.queues, self.visibility, self._shutdown
        )
        self.group_notes: dict[str, str] = {}
        self.is_watched = False
        self._guard = guard
        self._launch = launch
        self._entries = GuardEntries(guard, self._selection, retry)
        self._queue = StartQueue(self.places)
        self._spawner = Spawner(
            self.places, self.by_pid, self._selection, guard, self._entries, launch
        )
        self._unheard = unheard
        self._said_how_told: set[str] = set()
        self._to_retry: deque[WorkerHandle] = deque()
        self._notifications: Notifications
        self._pinning: InSteps
        self._retiring: InSteps
        self._stopping: InSteps
        self._changed: Callable[[WorkerHandle], None]
        self._settle: Settle
        self._ends: Ends
        self._removal: SocketRemoval
        self._startup: Startup
        self._loop: AbstractEventLoop

    def start(self, holds_ports: Callable[[], None]) -> None:
        """Start the first workers of the generation. The others start once there is a loop, see
        `watch`: a few at a time, so that who is ready serves meanwhile; and commands no more at
        once than the plan says, unless ALL_START_S have passed.

        Args:
            holds_ports: called when a worker has bound all addresses.

        Raises:
            BindError: an address cannot be had.
            KernelError: the kernel refuses processes, or sockets in the group.
            SystemExit: a signal says to end.
        """
        self._queue.is_of_new_service = True
        self._queue.limit(self.generation.plan.at_once)
        for seat in self.generation.plan.seats:
            self._await_start(seat)
        fork.pause(0)
        cpus = len(os.sched_getaffinity(0))
        first = self._queue.next(max(self.lot.size, min(cpus, _FIRST_AT_MOST)))
        self._spawner.spawn(first)
        self._queue.began(first)
        holds_ports()

    def _await_start(self, seat: WorkerSpec) -> None:
        place = self._take_place(seat)
        self._queue.add(place)

    def _start_all(self) -> None:
        """However many are not ready yet."""
        self._queue.lift_limit()
        self._start_more()

    def _start_more(self) -> None:
        """A few, and in the next turn of the loop more."""
        few = self._queue.next(self.lot.size) if not self._shutdown.has_begun else ()
        if not few:
            return
        try:
            self._begin(*few)
        except SteerError as error:
            if not self._queue.is_of_new_service:
                self.log.error("%s", error)
            for place in few:
                self._not_started(place, error)
        self._loop.call_soon(self._start_more)

    def _not_started(self, place: WorkerHandle, error: SteerError) -> None:
        """What cannot be started from the first on is not; of what was adopted others serve."""
        if not self._queue.is_of_new_service:
            self._fail_to_start(place, error)
            return
        place.state, _ = lifecycle.step(place.state, Event.EXITED)
        self._queue.clear()
        self._startup.refuse(error)

    def _fail_to_start(self, place: WorkerHandle, error: SteerError) -> None:
        place.failures += 1
        self._failed(place, error)

    def adopt(
        self,
        generations: Mapping[int, Generation],
        admitted: int,
        entries: Mapping[str, Entry],
        steering: Entry,
    ) -> None:
        """Go on with the workers that another controller left.

        Args:
            admitted: as it was there.
            generations: by number, those that places may be of.
            entries: its guard's, of the workers; the descriptors become ours.
            steering: its guard's, of the steering.
        """
        self.admitted = admitted
        left = msgspec.json.decode(steering.value, type=selection.Saved)
        held: dict[int, Sequence[int]] = {}
        for entry in entries.values():
            place = self._adopt(entry, generations)
            self.places.add(place)
            held[place.slot] = entry.fds[3:]
        self._selection.restore(left, steering.fds, held)
        for place in self.places:
            self._entries.save_one(place)
        self._selection.keep()
        self.places.sort(key=lambda place: (place.generation.number, place.seat.number))

    def _adopt(self, entry: Entry, generations: Mapping[int, Generation]) -> WorkerHandle:
        saved = msgspec.json.decode(entry.value, type=Saved)
        generation, now_s = generations[saved.generation], self.clock.now_s()
        place = WorkerHandle.restored(saved, generation, now_s, self.admitted)
        launch = self._launch(place)
        worker = WorkerProcess.adopted(launch, self._guard, saved.running, entry)
        if worker is not None:
            self._spawner.give(place, worker)
        return place

    def fill(self) -> None:
        """After `watch`: start a worker on each seat of the generation that nobody has, and
        let those go that are of another, or came with a change that was not finished."""
        seats = self.generation.plan.seats
        seated: dict[int, WorkerHandle] = {}
        for place in self.places:
            # Of two on a seat the later one: the earlier was to be replaced by it.
            if self._belongs(place) and (place.process or place.seat.number not in seated):
                seated[place.seat.number] = place
        for place in list(self.places):
            if seated.get(place.seat.number) is not place:
                self.report(place, Event.RETIRE)
        for seat in seats:
            if seat.number not in seated:
                self._await_start(seat)
        self._start_more()

    def _belongs(self, place: WorkerHandle) -> bool:
        now, comes_or_goes = self.generation, place.held or place.is_on_its_way_out
        there_is_such_a_seat = place.seat.number < len(now.plan.seats)
        return place.generation.number == now.number and there_is_such_a_seat and not comes_or_goes

    def watch(
        self, loop: AbstractEventLoop, settle: Settle, changed: Callable[[WorkerHandle], None]
    ) -> None:
        """Look after the workers from here on.

        Args:
            changed: told that a worker is in another state.
        """
        self._loop, self._settle, self._changed = loop, settle, changed
        self.is_watched = True
        self.retry.watch(loop)
        self._selection.watch(loop)
        self._entries.watch(loop)
        self._startup = Startup(loop, self.places)
        self._shutdown.watch(loop)
        self._removal = SocketRemoval(self._selection, self._shutdown, self.log, self.retry)
        ended = EndedWorkers(
            self.by_pid,
            self._selection,
            self._removal,
            self._startup,
            self._shutdown,
            self.log,
            self.retry,
            self._failed,
        )
        self._ends = Ends(loop, self.retry, ended.lose, ended.take, before=self._entries.drop)
        self._notifications = Notifications(
            self.places, self.by_pid, self.clock, self._unheard, self.report, changed
        )
        self._pinning = InSteps(loop, self._pin)
        self._retiring = InSteps(loop, self._retire)
        self._stopping = InSteps(
            loop, self._tell_to_stop, self._shutdown.end_if_empty, self.retry.spare.lent
        )
        self.clock.run(loop, self.looks.take)
        if self._queue.is_limited:
            loop.call_later(ALL_START_S, self._start_all)
        for place in list(self.places):
            if place.process is not None:
                self._watch(place, place.process)
            elif place.starts:
                self.log.warning("worker %d ended while there was no controller", place.slot)
                self.report(place, Event.EXITED)
        if any(place.serves for place in self.places):
            self._startup.succeed()
            self._selection.flip()

    def abandon(self) -> None:
        """Leave no process, whatever happened."""
        with suppress(OSError):  # each of them is killed below
            family.kill([place.process.family for place in self.places if place.process])
        for place in self.places:
            self._spawner.kill(place)
        self._shutdown.kill_leftovers()

    # What is asked of it.

    @property
    def steering(self) -> Backend:
        """The backend in force."""
        return self._selection.steering

    @property
    def up(self) -> Future[None]:
        """Done when the first worker is ready; or holds AppLoadError if the application cannot
        be loaded, WorkersFailed if all workers failed before."""
        return self._startup.up

    @property
    def refused(self) -> Future[None]:
        """Holds what keeps the rest of the workers from being started once some serve."""
        return self._startup.refused

    @property
    def ended(self) -> Future[None]:
        """Done when all have ended after `stop`."""
        return self._shutdown.ended

    @property
    def is_ending(self) -> bool:
        """Whether all workers are told to end, and nobody need look at them any more."""
        return self._shutdown.has_begun

    @property
    def own_pids(self) -> set[int | None]:
        """Of this controller and its guard, who may have sockets of workers open."""
        return {os.getpid(), self._guard.pid}

    def settle(self) -> None:
        """Have who is said to be ready in the table by now. Raises KernelError."""
        self._selection.settle()

    async def flipped(self) -> None:
        """Until who is said to be ready is in the table, or that was tried."""
        await self._selection.flipped()

    async def settled(self) -> None:
        """Until all that was chosen before who serves now is in its queue."""
        await self._selection.settled()

    def flip_now_due(self) -> int:
        """See `Selection.flip_now_due`."""
        return self._selection.flip_now_due()

    def has_settled(self, flip: int) -> bool:
        """See `Selection.has_settled`."""
        return self._selection.has_settled(flip)

    def when_settled(self, act: str, do: Callable[[], object], flip: int) -> None:
        """See `Selection.when_settled`."""
        self._selection.when_settled(act, do, flip)

    @property
    def retired(self) -> Counts:
        """What was counted for slots since given up."""
        return self._selection.retired

    def recruit(
        self,
        seats: Sequence[WorkerSpec],
        generation: Generation,
        modest: bool,
        told: Callable[[WorkerHandle], None],
    ) -> Sequence[WorkerHandle]:
        """Start workers that are held until `admit`, all or none.

        Args:
            modest, told: see `WorkerHandle`.

        Raises:
            BindError, KernelError, WorkersFailed: one could not be started.
            ControlError: too many are there.
        """
        places: list[WorkerHandle] = []
        try:
            for seat in seats:
                places.append(self._take_place(seat, generation, held=True))
                places[-1].modest, places[-1].told = modest, told
                places[-1].change = self.admitted + 1
            self._begin(*places)
        except SteerError:
            for place in places:
                self._forget(place)
            raise
        return places

    def admit(self, places: Sequence[WorkerHandle]) -> None:
        """From now on they may be chosen, all at once. The guard is to be told that this change
        is admitted, and so need not be told of each of them: of a thousand that takes long."""
        for place in places:
            place.held, place.told = False, None
        self.admitted += 1
        self._selection.flip_soon()

    def retire(self, places: Iterable[WorkerHandle]) -> None:
        """They leave the table all at once. What follows is done in steps. A controller that
        adopts the workers meanwhile retires those whose seats others have."""
        leaving = []
        for place in places:
            if place.is_in_service:
                place.leaving = True
                leaving.append(place)
            else:
                self.report(place, Event.RETIRE)
        self._selection.flip_soon()
        self._retiring.begin_soon(leaving)

    def _retire(self, place: WorkerHandle) -> None:
        self.report(place, Event.RETIRE)

    def stop(self, within_s: float, quick: bool) -> None:
        """Ask every worker to finish what it has; those that have not by then are killed.

        Args:
            quick: they need not finish.
        """
        self._shutdown.begin(within_s, quick)
        self.retry.attempt("have nobody adopt what is left", self._leave_nothing_to_adopt)
        self.retry.attempt("let go of the ports", self._selection.release)
        self._startup.succeed()
        self._stopping.begin(self.places)

    def _leave_nothing_to_adopt(self) -> None:
        self._guard.give_up()
        there = (place.process for place in self.places if self.steering.held(place.slot))
        self._guard.let_go(*(worker.key for worker in there if worker))

    def _tell_to_stop(self, place: WorkerHandle) -> None:
        self.report(place, Event.STOP)

    def reaped(self, pids: Iterable[int]) -> None:
        """Children of ours have ended that somebody had left behind."""
        self._ends.reaped(pids)

    def serve_early(self, pid: int) -> bool:
        """The process `pid` is ready before there is a loop: it alone is chosen until then, if it
        is a worker that may be; whether it is.

        Only so much: whoever called this has to tell `notified` the same once there is one.
        """
        place = notifications.of(self.by_pid, pid)
        if place is None or not place.process or not place.process.is_callable:
            return False
        with self._selection.naming_locked():
            self.steering.steer([place.member()])
        self.steering.empty_reserve()
        return True

    def notified(self, lineage: Sequence[int], message: Mapping[str, str]) -> None:
        """See `Notifications.take`."""
        self._notifications.take(lineage, message)

    def report(self, place: WorkerHandle, event: Event) -> None:
        """Something happened to a worker: do what follows."""
        if event is Event.LATE and self._may_be_ready(place):
            event = Event.READY
        if event is Event.READY and place.process and place.process.problem:
            return  # it is about to end
        if event is Event.OVERDUE and self._is_busy(place):
            self._set_timer(place, self._graceful_timeout_s, event)
            return
        is_told_by_others = place.held or not self._startup.has_succeeded
        if event is Event.OVERDUE or (event is Event.LATE and not is_told_by_others):
            self.log.warning("worker %d: %s", place.slot, event.value)
        before = place.state
        place.hung |= place.hangs and event is Event.RETIRE
        place.state, commands = lifecycle.step(before, event)
        for command in commands:
            self._carry_out(place, command, place.state)
        if not self._shutdown.has_begun:  # nobody is to adopt it, see `_leave_nothing_to_adopt`
            self._entries.save_soon(place)
        if place.state is not before:
            self._changed(place)
            if before is State.STARTING and self._queue.is_limited:
                self._loop.call_soon(self._start_more)

    def _may_be_ready(self, place: WorkerHandle) -> bool:
        """Whether it may wait in a way that is not seen."""
        if self._is_unseen(place):
            return True
        is_elsewhere = place.process and elsewhere.diagnosis(place.process)
        return place.says_ready and not is_elsewhere

    def _is_unseen(self, place: WorkerHandle) -> bool:
        """Whether nobody can tell if it waits on its sockets."""
        if place.process is None or waits(place.process) is not Seen.UNKNOWN:
            return False
        self.visibility.refused(WAITS, place.process)
        return True

    def _carry_out(self, place: WorkerHandle, command: Command, state: State) -> None:
        """Now, and where that fails again, as long as the worker is in this state."""
        self.retry.until_done(
            f"worker {place.slot}: {command.value}",
            partial(_DO[command], self, place),
            wanted=lambda: place.state is state and place in self.places,
        )

    def _is_busy(self, place: WorkerHandle) -> bool:
        """Taken for hung, it still may be at a request that takes long."""
        return (
            place.hung and not self._shutdown.has_begun and place.has_computed(self.clock.now_s())
        )

    def renew_reserve(self, service: Service) -> None:
        """The reserve is to listen as the workers do from now on."""
        try:
            self._selection.renew_reserve(service)
        except SteerError as error:
            self.log.error("the reserve is not as configured: %s", error)

    def choose_by(self, plan: Plan, steering: Backend | None = None) -> None:
        """Another policy, other parameters or weights, from now on.

        Args:
            steering: another backend for it, to which all sockets are new; None: the same.

        Raises:
            KernelError: nothing has changed.
        """
        seats = {seat.number: seat for seat in plan.seats}
        moves = {place.slot: seats.get(place.seat.number, place.seat) for place in self.places}
        members = [place.member(moves[place.slot]) for place in self.places if place.serves]
        self._selection.choose_by(plan, members, steering)
        now = Generation(self.generation.number, plan)
        for place in self.places:
            if place.generation.number == now.number:
                place.generation = now
        moved = [place for place in self.places if place.seat != moves[place.slot]]
        unpinned = [place for place in moved if place.reseat(moves[place.slot])]
        self._entries.save(moved, look=False)
        self.generation = now
        self._selection.keep()
        # Nobody waits for it: wherever workers run, they get what the table says.
        self._pinning.begin(unpinned)

    def attach_again(self) -> None:
        """What steers to every group, as a worker may have attached something else."""
        self._selection.attach_again()

    def pin(self) -> None:
        """Each worker to the CPUs of its seat: where a cpuset grows, cgroup v1 takes that back."""
        self._pinning.begin(self.places)

    def _pin(self, place: WorkerHandle) -> None:
        self.retry.attempt(f"pin worker {place.slot}", place.pin)

    # Commands.

    def _start_again(self, *places: WorkerHandle) -> None:
        """All in one lot; if that fails each alone, as there may be what some of them need."""
        try:
            for place in places:
                self._selection.give_up(place.slot)
                place.slot = self._selection.take_slot()
            self._begin(*places)
        except Exception as error:  # noqa: BLE001 - no seat stays empty for it
            if len(places) > 1:
                for place in places:
                    self._start_again(place)
                return
            refusal = as_refusal(f"start worker {places[0].slot}", error)
            self.log.error("%s", refusal)
            self._fail_to_start(places[0], refusal)

    def _activate(self, place: WorkerHandle) -> None:
        place.cancel_timer()
        if not place.held:
            self._selection.flip_soon()
        got_ready = partial(place.got_ready, self.clock.now_s())
        self.retry.attempt(f"look at worker {place.slot}", got_ready)
        self.log.info("worker %d ready", place.slot)
        if place.told:
            place.told(place)
        if self._startup.succeed():
            for each in self.places:
                if each.state is State.BACKOFF and each.starts:  # it may have waited for this
                    self._set_timer(each, 0.0, Event.RETRY)

    def _deactivate(self, place: WorkerHandle) -> None:
        if not self._shutdown.has_begun and not place.leaving:
            self._selection.flip_soon()

    def shed(self, place: WorkerHandle, is_shed: bool) -> None:
        """One that is at capacity is chosen no more, and others get what waits for it; or is
        chosen again."""
        place.shed = is_shed
        self._selection.flip_soon()
        if is_shed:
            self._migration.migrate_settled(place)

    def move_queue(self, place: WorkerHandle) -> None:
        """See `QueueMigration.migrate`."""
        self._migration.migrate(place)

    def _migrate_queue(self, place: WorkerHandle) -> None:
        self._migration.migrate_hung(place)

    def _start_settling(self, place: WorkerHandle) -> None:
        self._set_timer(place, self._graceful_timeout_s, Event.OVERDUE)
        place.settling = self._settle(place)

    def _terminate(self, place: WorkerHandle) -> None:
        if self._shutdown.has_begun:
            # There is nobody left to whom what waits for it could be moved.
            place.cancel_settling()
            self._set_timer(place, self._shutdown.within_s, Event.OVERDUE)
        elif place.settling is None:  # else its time runs already
            self._set_timer(place, self._graceful_timeout_s, Event.OVERDUE)
        if place.process:
            # One that was never ready has nothing to finish, and may not yet know its own signal.
            quick = self._shutdown.is_quick or place.ready_s is None
            place.process.terminate(quick)
            self._say_how_told(place.process)
        if place.hung and not self._shutdown.has_begun:
            self._note_activity(place)

    def _say_how_told(self, worker: WorkerProcess) -> None:
        """All of them are alike, so it is said once."""
        why = worker.why_told_so
        if why and why not in self._said_how_told:
            self._said_how_told.add(why)
            self.log.info("workers are told to finish by %s", why)

    def _note_activity(self, place: WorkerHandle) -> None:
        """So that it can be asked later whether it has acted since."""
        look = partial(place.has_computed, self.clock.now_s())
        self.retry.attempt(f"look at worker {place.slot}", look)

    @property
    def _graceful_timeout_s(self) -> float:
        return self.generation.plan.service.graceful_timeout

    def _kill(self, place: WorkerHandle) -> None:
        if not place.process:
            return
        if place.state is State.STARTING:
            place.process.problem = elsewhere.not_ready(place.process)
        self._ends.kill(place.process)

    def _back_off(self, place: WorkerHandle) -> None:
        after_s = lifecycle.backoff_s(place.failures, place.ready_s is not None)
        place.ready_s = None
        if self._startup.listens_elsewhere:
            # Another one would fail as this one has, until that one is ready or has failed.
            after_s = place.generation.plan.service.ready_timeout
        elif after_s and self._startup.has_succeeded:
            self.log.warning("worker %d failed again; another in %g s", place.slot, after_s)
        self._set_timer(place, after_s, Event.RETRY)

    def _forget(self, place: WorkerHandle) -> None:
        place.cancel_timer()
        place.cancel_settling()
        self._selection.give_up(place.slot)
        self.places.remove(place)
        self._shutdown.end_if_empty()

    # What happens to workers.

    def _take_place(
        self, seat: WorkerSpec, generation: Generation | None = None, held: bool = False
    ) -> WorkerHandle:
        place = WorkerHandle(
            seat, self._selection.take_slot(), generation or self.generation, held=held
        )
        self.places.add(place)
        if self.is_watched:
            self._startup.add(place)
        return place

    def _begin(self, *places: WorkerHandle) -> None:
        """Start a process for each, and look after it.

        Raises:
            SteerError: one could not be started; there is none.
        """
        began_s = time.monotonic()
        try:
            with self.retry.spare.lent():
                workers = self._spawner.spawn(places)
                self._queue.began(places)
                for place, worker in zip(places, workers, strict=True):
                    self._watch(place, worker)
            self.lot.took(time.monotonic() - began_s)
        except Exception as error:  # noqa: BLE001 - no seat stays empty for it
            for place in places:
                if place.process is not None:
                    self._ends.forget(place.process)
                self._spawner.kill(place)
                self._removal.remove(place)
            raise as_refusal(f"start worker {places[0].slot}", error) from None

    def _watch(self, place: WorkerHandle, worker: WorkerProcess) -> None:
        self._ends.watch(place, worker)
        if place.state is State.STARTING:
            self._set_timer(place, worker.launch.service.ready_timeout, Event.LATE)
            self._changed(place)
        else:  # adopted
            self._go_on(place, worker)

    def _go_on(self, place: WorkerHandle, worker: WorkerProcess) -> None:
        """With what was under way with it."""
        if place.hangs:
            self.retry.attempt(f"look at worker {place.slot}", place.has_acted)
        elif place.state is State.STOPPING and worker.told:
            self._terminate(place)
        elif place.state is State.STOPPING:
            self._start_settling(place)

    def save(self) -> None:
        """Tell the guard now what it would be told after this turn of the loop."""
        self._entries.flush()
        self._selection.keep_if_due()

    def _failed(self, place: WorkerHandle, error: SteerError) -> None:
        """Whether the service can still come up; `error` is told if it cannot."""
        place.error = error
        if place.held:
            self._fail_held(place)
            return
        if place.leaving:
            self.report(place, Event.RETIRE)
        self.report(place, Event.EXITED)
        self._startup.fail(error)

    def _fail_held(self, place: WorkerHandle) -> None:
        """It is not tried again: whoever asked for it is told."""
        self.report(place, Event.RETIRE)
        self.report(place, Event.EXITED)
        if place.told:
            place.told(place)

    def _set_timer(self, place: WorkerHandle, after_s: float, event: Event) -> None:
        place.set_timer(self.clock.call_later(after_s, self._on_time, place, event))

    def _on_time(self, place: WorkerHandle, event: Event) -> None:
        if event is Event.RETRY:
            if not self._to_retry:
                self._loop.call_soon(self._retry_some)
            self._to_retry.append(place)
        else:
            self._report_until_done(place, event)

    def _retry_some(self) -> None:
        """A lot in a turn of the loop: to start workers takes time, and all may have ended."""
        lot = [self._to_retry.popleft() for _ in range(min(self.lot.size, len(self._to_retry)))]
        if self._to_retry:
            self._loop.call_soon(self._retry_some)
        # One that was asked to hurry may be there twice.
        lot = [place for place in dict.fromkeys(lot) if place.state is State.BACKOFF]
        if self._shutdown.has_begun:
            for place in lot:
                self._report_until_done(place, Event.STOP)
        elif lot:
            for place in lot:
                place.state, _ = lifecycle.step(place.state, Event.RETRY)
            self._start_again(*lot)

    def _report_until_done(self, place: WorkerHandle, event: Event) -> None:
        act = f"worker {place.slot}: {event.value}"
        wanted = partial(self.places.__contains__, place)
        self.retry.until_done(act, partial(self.report, place, event), wanted)


_DO: dict[Command, Callable[[WorkerPool, WorkerHandle], None]] = {
    Command.SPAWN: WorkerPool._start_again,
    Command.ACTIVATE: WorkerPool._activate,
    Command.DEACTIVATE: WorkerPool._deactivate,
    Command.RESCUE: WorkerPool._migrate_queue,
    Command.SETTLE: WorkerPool._start_settling,
    Command.TERMINATE: WorkerPool._terminate,
    Command.KILL: WorkerPool._kill,
    Command.BACK_OFF: WorkerPool._back_off,
    Command.FORGET: WorkerPool._forget,
}
