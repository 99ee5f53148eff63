"""The workers of a service: started, watched, started again, ended.

What follows from what is in `lifecycle`; here are the clocks and the processes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec

from steer import lifecycle
from steer.errors import AppLoadError, ControlError, KernelError, SteerError, WorkersFailed
from steer.kernel import proc, process, sockets
from steer.kernel.custody import Entry, Guard
from steer.kernel.keeper import STEERING
from steer.kernel.proc import Seen
from steer.lifecycle import Command, Event, State
from steer.log import Log
from steer.plan import Generation, Plan, Seat
from steer.spawn import Process, Running
from steer.steering import Counts, Steering
from steer.table import Member
from steer.worker import Launch

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Handle, Task, TimerHandle

QUICK_S = 1.0
"""How long a quick stop waits between SIGTERM and SIGKILL."""


class Place(msgspec.Struct, eq=False):
    """A seat and who is in it: a process, or the wait for the next one.

    Args:
        held: not to be chosen yet, as it comes together with others.
        modest: to leave the CPUs to those that serve until it is ready.
        came_up: of one that is held: done once it is ready, or with what went wrong.
        failures: ends in a row before `lifecycle.STABLE_S` of service.
        says_ready: whether it sent READY=1.
        heard_s: when it last sent WATCHDOG=1, or was ready.
        takers: its processes that were seen to wait on its sockets.
        activity: see `proc.activity`: of these, at the last look at them.
        hung: when it was retired.
        relief_s: not before then is another asked for in its place.
        others: sockets it had open when it got ready, which so are no connections.
        said: what it sent as STATUS=.
        error: why there is no process.
    """

    seat: Seat
    slot: int
    generation: Generation
    state: State = State.STARTING
    held: bool = False
    modest: bool = False
    came_up: Future[None] | None = None
    process: Process | None = None
    ready_s: float | None = None
    starts: int = 0
    failures: int = 0
    says_ready: bool = False
    heard_s: float = 0.0
    takers: frozenset[int] = frozenset()
    activity: int = 0
    hung: bool = False
    relief_s: float = 0.0
    others: set[int] = set()
    said: str = ""
    timer: TimerHandle | None = None
    settling: Task[None] | None = None
    error: SteerError | None = None

    @property
    def serves(self) -> bool:
        """Whether it may be chosen."""
        return self.state is State.READY and not self.held

    @property
    def hangs(self) -> bool:
        return self.state is State.HUNG

    def has_acted(self) -> bool:
        """Whether those who take its connections did anything since this was last asked."""
        before = self.activity
        if self.process:
            self.activity = proc.activity(self.process.pid, among=self.takers)
        return self.activity != before


Settle = Callable[["Fleet", Place], Coroutine[Any, Any, None]]
"""Waits until nothing waits for a worker, reports it, and sees that it stays so."""


class Saved(msgspec.Struct, frozen=True):
    """A place with a process, as another controller left it."""

    running: Running
    seat: Seat
    slot: int
    generation: int
    state: str
    held: bool
    ready_s: float | None
    starts: int
    failures: int
    says_ready: bool
    others: set[int]
    takers: frozenset[int]
    hung: bool


class _Steered(msgspec.Struct, frozen=True):
    """The steering, what was counted, and the next slot, as another controller left them."""

    value: Any
    retired: Counts
    next_slot: int


class Fleet:
    """All workers of one service.

    First `start` or `adopt`, then `watch` in a running loop: what it takes to have a loop
    is imported while the workers already start.

    Args:
        generation: the first.
        slots: capacity; a worker's slot is below it.
        guard: has all that another controller needs.
        launch: makes a worker's instructions.

    Attributes:
        generation: the one in force; a place may be of an earlier one, and on its way out.
        retired: what was counted for slots since given up.
    """

    def __init__(
        self,
        generation: Generation,
        slots: int,
        steering: Steering,
        guard: Guard,
        launch: Callable[[Place], Launch],
        log: Log,
    ) -> None:
        self.generation = generation
        self.places: list[Place] = []
        self.retired = Counts()
        self.steering = steering
        self.log = log
        self._slots = slots
        self._next_slot = 0
        self._guard = guard
        self._launch = launch
        self._flip_due: Handle | None = None
        self._ending = False
        self._ending_in_s = 0.0
        self._changed: Callable[[Place], None]
        self._settle: Settle
        self._loop: AbstractEventLoop
        self.up: Future[None]
        self.ended: Future[None]

    def start(self, holds_ports: Callable[[], None]) -> None:
        """Start every worker of the generation.

        Args:
            holds_ports: called when a worker has bound all addresses.

        Raises:
            BindError: an address cannot be had.
            KernelError: the kernel refuses processes, or sockets in the group.
            SystemExit: a signal says to end.
        """
        for seat in self.generation.plan.seats:
            place = self._take_place(seat)
            process.pause(0)
            try:
                self._spawn(place)
                holds_ports()
            except WorkersFailed as error:
                # Like one that ends later: the others start, and it is tried again.
                place.error = error

    def adopt(
        self,
        generations: Mapping[int, Generation],
        entries: Mapping[str, Entry],
        steering: Entry,
    ) -> None:
        """Go on with the workers that another controller left.

        Args:
            generations: by number, those that places may be of.
            entries: its guard's, of the workers; the descriptors become ours.
            steering: its guard's, of the steering.
        """
        left = msgspec.json.decode(steering.value, type=_Steered)
        self.retired, self._next_slot = left.retired, left.next_slot
        held: dict[int, Sequence[int]] = {}
        for entry in entries.values():
            place = self._adopt(entry, generations)
            self.places.append(place)
            held[place.slot] = entry.fds[3:]
        self.steering.restore(left.value, steering.fds, held)
        # One may have been on its way out, and its slot not yet given up.
        for slot in set(range(self._slots)).difference(held):
            self.retired += self.steering.retire(slot) or Counts()
        self._reassert()
        for place in self.places:
            self._save(place)
        self._save_steering()
        self.places.sort(key=lambda place: (place.generation.number, place.seat.number))

    def _reassert(self) -> None:
        with ExitStack() as lent:
            try:
                there = {
                    place.slot: lent.enter_context(place.process.sockets())
                    for place in self.places
                    if place.process
                }
                self.steering.reassert(there)
            except KernelError as error:
                self.log.warning("not seen whether the kernel steers as it should: %s", error)

    def _adopt(self, entry: Entry, generations: Mapping[int, Generation]) -> Place:
        saved = msgspec.json.decode(entry.value, type=Saved)
        place = Place(saved.seat, saved.slot, generations[saved.generation])
        place.state = State(saved.state)
        place.held, place.ready_s, place.starts = saved.held, saved.ready_s, saved.starts
        place.failures, place.says_ready = saved.failures, saved.says_ready
        place.others, place.heard_s = saved.others, time.monotonic()
        place.takers, place.hung = saved.takers, saved.hung
        launch = self._launch(place)
        place.process = Process.adopted(launch, self._guard, saved.running, entry)
        return place

    def fill(self) -> None:
        """After `watch`: start a worker on each seat of the generation that nobody has, and
        let those go that are of another, or came with a change that was not finished."""
        seats = self.generation.plan.seats
        seated: dict[int, Place] = {}
        for place in self.places:
            # Of two on a seat the later one: the earlier was to be replaced by it.
            if self._belongs(place) and (place.process or place.seat.number not in seated):
                seated[place.seat.number] = place
        for place in list(self.places):
            if seated.get(place.seat.number) is not place:
                self.report(place, Event.RETIRE)
        for seat in seats:
            if seat.number not in seated:
                place = self._take_place(seat)
                place.state = State.BACKOFF
                self.report(place, Event.RETRY)

    def _belongs(self, place: Place) -> bool:
        now, comes_or_goes = self.generation, place.held or place.state is State.STOPPING
        there_is_such_a_seat = place.seat.number < len(now.plan.seats)
        return place.generation.number == now.number and there_is_such_a_seat and not comes_or_goes

    def watch(
        self,
        loop: AbstractEventLoop,
        settle: Settle,
        changed: Callable[[Place], None],
    ) -> None:
        """Look after the workers from here on.

        `up` is then done when the first is ready; or holds AppLoadError if the
        application cannot be loaded, WorkersFailed if all failed before. `ended` is
        done when all have ended after `stop`.

        Args:
            changed: told that a worker is in another state.
        """
        self._loop, self._settle, self._changed = loop, settle, changed
        self.up = loop.create_future()
        self.ended = loop.create_future()
        for place in list(self.places):
            if place.process is not None:
                self._watch(place, place.process)
            elif place.error is not None:
                place.failures += 1
                self._failed(place, place.error)
            else:
                self.log.warning("worker %d ended while there was no controller", place.slot)
                self.report(place, Event.EXITED)
        if any(place.serves for place in self.places):
            self.up.set_result(None)
            self._steer()

    def abandon(self) -> None:
        """Leave no process, whatever happened."""
        for place in self.places:
            if place.process is not None:
                place.process.end()
                place.process = None

    # What is asked of it.

    def recruit(self, seat: Seat, generation: Generation, modest: bool) -> Place:
        """Start a worker that is held until `admit`; its `came_up` tells how it goes.

        Args:
            modest: see `Place`.

        Raises:
            BindError, KernelError, WorkersFailed: it could not be started.
            ControlError: too many are there.
        """
        place = self._take_place(seat, generation, held=True)
        place.modest = modest
        place.came_up = self._loop.create_future()
        try:
            self._watch(place, self._spawn(place))
        except SteerError:
            self._forget(place)
            raise
        return place

    def admit(self, places: Sequence[Place]) -> None:
        """From now on they may be chosen, all at once."""
        for place in places:
            place.held = False
            self._save(place)
        self._steer_soon()

    def stop(self, within_s: float) -> None:
        """Ask every worker to finish what it has; those that have not by then are killed."""
        self._ending, self._ending_in_s = True, within_s
        self._guard.give_up()
        for place in list(self.places):
            if place.process is not None:
                self._save(place, with_sockets=False)
        self._watch_reserve(False)
        self._guard.drop(STEERING)
        self.steering.release()
        for place in list(self.places):
            self.report(place, Event.STOP)
        if not self.up.done():
            self.up.set_result(None)
        self._end_if_empty()

    def serve_early(self, pid: int) -> None:
        """The process `pid` is ready before there is a loop: it alone is chosen until then.

        Only so much: whoever called this has to tell `notified` the same once there is one.
        """
        for place in self.places:
            if place.process and place.process.pid == pid and place.process.is_callable:
                self.steering.steer([_member(place, place.seat)])
                self.steering.empty_reserve()

    def notified(self, pid: int, message: Mapping[str, str]) -> None:
        """The process `pid` sent this, see sd_notify(3).

        A command that says READY=1 is looked at all the same: gunicorn says so before its
        workers have loaded the application.
        """
        for place in self.places:
            if place.process and proc.is_descendant(pid, place.process.pid):
                self._hear(place, place.process, message)

    def _hear(self, place: Place, worker: Process, message: Mapping[str, str]) -> None:
        place.said = message.get("STATUS", place.said)
        if message.get("STOPPING") == "1":
            self.report(place, Event.DRAIN)
        if message.get("WATCHDOG") == "1":
            place.heard_s = time.monotonic()
        elif message.get("WATCHDOG") == "trigger":
            place.heard_s = -float("inf")
        if message.get("READY") == "1" and place.state is State.STARTING:
            place.says_ready = True
            is_callable = not worker.launch.service.command
            if is_callable or waits(worker) is not Seen.NO:
                self.report(place, Event.READY)

    def report(self, place: Place, event: Event) -> None:
        """Something happened to a worker: do what follows."""
        if event is Event.LATE and place.says_ready:
            event = Event.READY  # it waits in a way that is not seen
        if event is Event.OVERDUE and self._is_busy(place):
            self._set_timer(place, self._graceful_timeout_s, event)
            return
        if event in (Event.LATE, Event.OVERDUE):
            self.log.warning("worker %d: %s", place.slot, event.value)
        before = place.state
        place.hung |= place.hangs and event is Event.RETIRE
        place.state, commands = lifecycle.step(before, event)
        for command in commands:
            _DO[command](self, place)
        self._save(place)
        if place.state is not before:
            self._changed(place)

    def _is_busy(self, place: Place) -> bool:
        """Taken for hung, it still may be at a request that takes long."""
        return place.hung and not self._ending and place.has_acted()

    def choose_by(self, plan: Plan, steering: Steering | None = None) -> None:
        """Another policy, other parameters or weights, from now on.

        Args:
            steering: another backend for it, to which all sockets are new; None: the same.

        Raises:
            KernelError: nothing has changed.
        """
        self.settle()
        seats = {seat.number: seat for seat in plan.seats}
        moves = {place.slot: seats.get(place.seat.number, place.seat) for place in self.places}
        members = [_member(place, moves[place.slot]) for place in self.places if place.serves]
        if steering is None:
            self.steering.swap(plan, members, self.lend)
        else:
            self._move_to(steering, members)
        for place in self.places:
            place.generation = self._with(place.generation, plan)
            self._seat(place, moves[place.slot])
        self.generation = Generation(self.generation.number, plan)
        self._watch_reserve(bool(members))
        self._save_steering()

    def _with(self, generation: Generation, plan: Plan) -> Generation:
        in_force = generation.number == self.generation.number
        return Generation(generation.number, plan) if in_force else generation

    def _seat(self, place: Place, seat: Seat) -> None:
        before, place.seat = place.seat, seat
        if place.process and before.cpus != seat.cpus:
            process.pin(proc.descendants(place.process.pid), seat.cpus)
        self._save(place)

    def _move_to(self, steering: Steering, members: Sequence[Member]) -> None:
        """Have another backend choose; it takes the sockets over with the next flip.

        Raises:
            KernelError: nothing has changed.
        """
        binds = range(len(self.generation.plan.binds))
        with ExitStack() as lent:
            there = {
                place.slot: lent.enter_context(place.process.sockets())
                for place in self.places
                if place.process
            }
            steering.steer(members)
            self._watch_reserve(False)
            try:
                self.steering.detach(self.lend)
                counted = self.counts()
                for slot, socks in there.items():
                    if len(socks) == len(binds):
                        fds = [os.dup(socks[index].fileno()) for index in binds]
                        steering.taken_over(slot, fds)
                steering.open_reserve()
            except SteerError:
                steering.detach(self.lend)
                self.steering.reassert(there)
                self.steering.open_reserve()
                self._watch_reserve(bool(members))
                raise
        self.retired = counted or self.retired
        steering.owns_counting = True
        self.steering.owns_counting = False
        self.steering.close()
        self.steering = steering

    @contextmanager
    def lend(self) -> Iterator[Mapping[int, socket.socket]]:
        """The sockets of one that serves, else of any, by bind; none where nobody is.

        Raises:
            KernelError: we may not.
        """
        there = [place for place in self.places if place.process]
        there.sort(key=lambda place: not place.serves)
        found: dict[int, socket.socket] = {}
        with ExitStack() as lent:
            for place in there:
                if len(found) < len(self.generation.plan.binds) and place.process:
                    found = {**lent.enter_context(place.process.sockets()), **found}
            yield found

    def settle(self) -> None:
        """Have who is said to be ready in the table by now."""
        if self._flip_due is not None:
            self._steer()

    def counts(self) -> Counts | None:
        """Of the whole service since its start; None where nobody counts."""
        now = [self.steering.counts(place.slot) for place in self.places]
        if self.steering.unsteered() is None:
            return None
        return sum((count for count in now if count is not None), self.retired)

    # Commands.

    def _start_again(self, place: Place) -> None:
        self._give_slot_up(place)
        place.slot = self._take_slot()
        try:
            self._watch(place, self._spawn(place))
        except SteerError as error:
            self.log.error("%s", error)
            place.failures += 1
            self._failed(place, error)

    def _activate(self, place: Place) -> None:
        now_s = time.monotonic()
        place.ready_s = place.ready_s or now_s
        place.heard_s = now_s
        self._cancel_timer(place)
        if place.process:
            with suppress(KernelError):
                place.others = proc.open_sockets(place.process.pid)
            place.takers = proc.waiters(place.process.pid, place.process.inodes)
            if place.process.launch.modest:
                process.hurry(proc.descendants(place.process.pid))
        self.log.info("worker %d ready", place.slot)
        self._steer_soon()
        if place.came_up and not place.came_up.done():
            place.came_up.set_result(None)
        if not self.up.done():
            self.up.set_result(None)

    def _deactivate(self, _place: Place) -> None:
        if not self._ending:
            self._steer_soon()

    def _rescue(self, place: Place) -> None:
        """Out of the table before its queue is moved, or that would come back to it."""
        self.settle()
        self.steering.let_go(place.slot)
        self.steering.settle()
        self.move_queue(place)

    def move_queue(self, place: Place) -> None:
        """What waits for a worker that is not chosen goes to others, if the kernel can."""
        if place.process:
            with suppress(KernelError), place.process.sockets() as owned:
                self.steering.rescue(place.slot, owned)

    def _start_settling(self, place: Place) -> None:
        self._set_timer(place, self._graceful_timeout_s, Event.OVERDUE)
        place.settling = self._loop.create_task(self._settle(self, place))

    def _terminate(self, place: Place) -> None:
        if self._ending:
            self._set_timer(place, self._ending_in_s, Event.OVERDUE)
        elif place.settling is None:  # else its time runs already
            self._set_timer(place, self._graceful_timeout_s, Event.OVERDUE)
        place.has_acted()
        if place.process:
            place.process.terminate()

    @property
    def _graceful_timeout_s(self) -> float:
        return self.generation.plan.service.graceful_timeout

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
        after_s = lifecycle.backoff_s(place.failures, place.ready_s is not None)
        place.ready_s = None
        if after_s:
            self.log.warning("worker %d failed again; another in %g s", place.slot, after_s)
        self._set_timer(place, after_s, Event.RETRY)

    def _forget(self, place: Place) -> None:
        self._cancel_timer(place)
        if place.settling is not None:
            place.settling.cancel()
        self._give_slot_up(place)
        self.places.remove(place)
        self._end_if_empty()

    def _end_if_empty(self) -> None:
        if self._ending and not self.places and not self.ended.done():
            self.ended.set_result(None)

    # What happens to workers.

    def _take_place(
        self, seat: Seat, generation: Generation | None = None, held: bool = False
    ) -> Place:
        place = Place(seat, self._take_slot(), generation or self.generation, held=held)
        self.places.append(place)
        return place

    def _spawn(self, place: Place) -> Process:
        """Start a process. Raises BindError, KernelError, WorkersFailed."""
        place.starts += 1
        launch = self._launch(place)
        if not self.steering.reserve and not any(each.process for each in self.places):
            # Nobody of ours keeps the ports: somebody else may be there by now.
            for bind in launch.binds:
                sockets.check_free(bind)
        place.process = Process(
            launch,
            self._guard,
            lambda fds: self._joined(place, fds),
        )
        self._save(place)
        return place.process

    def _joined(self, place: Place, fds: Sequence[int]) -> None:
        self.steering.joined(place.slot, fds)
        self._save_steering()

    def _left(self, place: Place) -> None:
        self.steering.left(place.slot)
        self._save_steering()

    def _save_steering(self) -> None:
        value, fds = self.steering.saved()
        steered = _Steered(value, self.retired, self._next_slot)
        self._guard.put(STEERING, msgspec.json.encode(steered), fds)

    def _watch(self, place: Place, worker: Process) -> None:
        worker.watch(self._loop, lambda gone, status: self._on_end(place, gone, status))
        if place.state is State.STARTING:
            self._set_timer(place, worker.launch.service.ready_timeout, Event.LATE)
            self._changed(place)
        else:  # adopted
            self._go_on(place, worker)

    def _go_on(self, place: Place, worker: Process) -> None:
        """With what was under way with it."""
        if place.hangs:
            place.has_acted()
        elif place.state is State.STOPPING and worker.told:
            self._terminate(place)
        elif place.state is State.STOPPING:
            self._start_settling(place)

    def _save(self, place: Place, with_sockets: bool = True) -> None:
        """Have the guard know what another controller would have to."""
        if place.process is None:
            return
        saved = Saved(
            place.process.running,
            place.seat,
            place.slot,
            place.generation.number,
            place.state.value,
            place.held,
            place.ready_s,
            place.starts,
            place.failures,
            place.says_ready,
            place.others,
            place.takers,
            place.hung,
        )
        held = self.steering.held(place.slot) if with_sockets else ()
        place.process.keep(msgspec.json.encode(saved), held)

    def _take_slot(self) -> int:
        """A slot that nobody has, the next one round.

        Not one that was just given up: what still speaks of that means the worker that
        died.

        Raises:
            ControlError
        """
        taken = {each.slot for each in self.places}
        if len(taken) >= self._slots:
            raise ControlError(
                "start a worker", f"all {self._slots} slots are taken", "some still finish: wait"
            )
        while self._next_slot in taken:
            self._next_slot = (self._next_slot + 1) % self._slots
        slot = self._next_slot
        self._next_slot = (slot + 1) % self._slots
        return slot

    def _give_slot_up(self, place: Place) -> None:
        """What was counted for it is put aside."""
        self.retired += self.steering.retire(place.slot) or Counts()
        self._save_steering()

    def _on_end(self, place: Place, gone: Process, status: int | None) -> None:
        self._cancel_timer(place)
        self._left(place)
        place.process = None
        place.says_ready = False
        served_s = time.monotonic() - place.ready_s if place.ready_s is not None else 0.0
        place.failures = 1 if served_s >= lifecycle.STABLE_S else place.failures + 1
        if place.state is not State.STOPPING:
            self.log.warning(
                "worker %d (pid %d): %s", place.slot, gone.pid, process.how_it_ended(status)
            )
            if gone.problem and self.up.done():
                self.log.error("%s", gone.problem)
        error = gone.problem or WorkersFailed(
            "start workers", process.how_it_ended(status), detail=gone.last_words
        )
        self._failed(place, error)

    def _failed(self, place: Place, error: SteerError) -> None:
        """Whether the service can still come up; `error` is told if it cannot."""
        place.error = error
        if place.held:
            self._fail_held(place, error)
            return
        self.report(place, Event.EXITED)
        if self.up.done() or self._ending:
            return
        if isinstance(error, AppLoadError) or all(each.failures for each in self.places):
            self.up.set_exception(error)
            self.up.exception()  # retrieved here: nobody may be waiting yet

    def _fail_held(self, place: Place, error: SteerError) -> None:
        """It is not tried again: whoever asked for it is told."""
        self.report(place, Event.RETIRE)
        self.report(place, Event.EXITED)
        if place.came_up and not place.came_up.done():
            place.came_up.set_exception(error)
            place.came_up.exception()

    def _steer_soon(self) -> None:
        """Together with what else happens in the same turn of the loop."""
        if self._flip_due is None:
            self._flip_due = self._loop.call_soon(self._steer)

    def _steer(self) -> None:
        if self._flip_due is not None:
            self._flip_due.cancel()
            self._flip_due = None
        members = self._members()
        self.steering.steer(members)
        self._watch_reserve(bool(members))
        if not self._ending:
            self._save_steering()

    def _members(self) -> list[Member]:
        return [_member(place, place.seat) for place in self.places if place.serves]

    def _watch_reserve(self, somebody: bool) -> None:
        """What gets into the reserve late, as its handshake began when nobody was there, is
        moved on at once; while still nobody is, it waits."""
        for sock in self.steering.reserve:
            if somebody:
                self._loop.add_reader(sock, self.steering.empty_reserve)
            else:
                self._loop.remove_reader(sock)

    # Clocks.

    def _set_timer(self, place: Place, after_s: float, event: Event) -> None:
        self._cancel_timer(place)
        place.timer = self._loop.call_later(after_s, self.report, place, event)

    def _cancel_timer(self, place: Place) -> None:
        if place.timer is not None:
            place.timer.cancel()
            place.timer = None


def _member(place: Place, seat: Seat) -> Member:
    return Member(place.slot, seat.weight, seat.cpu)


def waits(process: Process) -> Seen:
    return proc.waits_on(process.pid, process.inodes)


_DO: dict[Command, Callable[[Fleet, Place], None]] = {
    Command.SPAWN: Fleet._start_again,
    Command.ACTIVATE: Fleet._activate,
    Command.DEACTIVATE: Fleet._deactivate,
    Command.RESCUE: Fleet._rescue,
    Command.SETTLE: Fleet._start_settling,
    Command.TERMINATE: Fleet._terminate,
    Command.KILL: Fleet._kill,
    Command.BACK_OFF: Fleet._back_off,
    Command.FORGET: Fleet._forget,
}
