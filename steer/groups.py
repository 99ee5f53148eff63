"""Sees that workers' sockets stay in their groups, and mends it where they do not.

What is to be seen and done is in `membership`; here are the looks. One costs some microseconds for
each socket, so no more of them are looked at in a second than `_MOST`, and only while something can
be seen that was not before: a connection came or ended, a worker is another or in another state,
or the kernel says something else of the sockets of a port. Of what changes without any of that
(SO_REUSEPORT taken back, a listener that is shut down and listens again) nobody takes any harm
until something comes; one socket after the other is looked at for it meanwhile.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from steer import anchor
from steer.address import Bind
from steer.errors import KernelError
from steer.fleet import Fleet
from steer.kernel import members, proc
from steer.lifecycle import State
from steer.looks import TOGETHER_S, on_the_beat
from steer.membership import Cure, Departure, Sighting, Tries, cure, departure
from steer.place import Place
from steer.programs import Programs
from steer.queues import Table, unchanged

if TYPE_CHECKING:
    from steer.spawn import Process

_LOOK_S = 1.0
_MOST, _AT_ONCE = 128, 16
_LOOKING_S = 0.005
"""So long in one step, however slow the machine is."""
_AT_REST_PER_S = 250
"""While nothing comes the kernel is asked for so many sockets in a second."""
_LOOK_AT_ONE = 4
"""The same: each so many times a worker is looked at."""
_AGAIN_S = 30.0
"""So long after it was asked for, a worker that did not come is asked for again."""
_NOTES_MAX = 32
_TAKES_ALL = (Departure.DISSOLVED, Departure.ON_DEVICE)
"""Over UDP, if the kernel finds it before the group."""


class _Socket(NamedTuple):
    """What is looked at: a worker's socket on one of its addresses.

    Args:
        at: the bind's number.
        sock: a duplicate; None where it cannot be had.
        is_held: whether this controller has it open, too.
        has: whether the worker has it open; None where that cannot be told.
    """

    place: Place
    worker: Process
    at: int
    bind: Bind
    sock: socket.socket | None
    is_held: bool
    has: bool | None

    @property
    def inode(self) -> int:
        return self.worker.bound[self.at]


class Groups:
    """The looks.

    Args:
        replace: asks for another worker, with new sockets, in place of one.
    """

    def __init__(self, fleet: Fleet, replace: Callable[[Place], None]) -> None:
        self._fleet = fleet
        self._replace = replace
        self._next = 0
        self._to_look_at = 0
        self._pulse: bytes | None = None
        self._tables: Sequence[Table | None] = ()
        self._out: set[Place] = set()
        self._usual_device = self._rests = 0
        self._tries: dict[int, Tries] = {}
        self._suspects: set[tuple[int, int]] = set()
        self._told: set[tuple[int, int, Departure]] = set()
        self._refused: set[int] = set()
        self._programs = Programs(fleet)
        self._programs_due_s = self._tables_due_s = 0.0
        self._due = fleet.looks.add("see that sockets stay in their groups", self._look, _LOOK_S)

    def forget(self) -> None:
        """The configuration may be another, and workers do otherwise."""
        self._tries.clear()
        self._fleet.group_notes.clear()
        self._look_at_all()

    def changed(self, _place: Place) -> None:
        """A worker is in another state."""
        self._look_at_all()

    def _look_at_all(self) -> None:
        """Each once, from now on."""
        self._to_look_at = len(self._fleet.places)
        self._due.within(_LOOK_S)

    def _look(self) -> float:
        """At some, if anything may have changed; in how many seconds to look again."""
        if self._fleet.is_ending:
            return math.inf
        if self._something_came():
            self._to_look_at = len(self._fleet.places)
        if not self._to_look_at:
            return self._rest()
        there = [each for each in self._fleet.places if each.state is not State.STARTING]
        self._forget_those_who_have_gone(there)
        self._usual_device = members.usual_device()
        looked_at = self._look_at_some(there)
        self._to_look_at = max(0, self._to_look_at - looked_at) if there else 0
        now_s = self._fleet.clock.read_s()
        if now_s >= self._programs_due_s:
            self._programs_due_s = on_the_beat(now_s, _LOOK_S) - TOGETHER_S
            look_at_programs = partial(self._programs.look, self._fleet.queues.at)
            self._fleet.retry.attempt("see that groups have their program", look_at_programs)
        if not self._to_look_at:
            return _LOOK_S
        return _LOOK_S * _AT_ONCE / min(_MOST, max(_AT_ONCE, self._sockets))

    def _something_came(self) -> bool:
        """Or may have, or somebody has to be looked at again."""
        before, self._pulse = self._pulse, self._fleet.steering.pulse()
        return self._pulse is None or self._pulse != before or bool(self._suspects or self._out)

    def _rest(self) -> float:
        """Nothing came: now and then see that the kernel says the same as before, and look at
        one."""
        self._programs.rest()
        now_s = self._fleet.clock.read_s()
        if now_s < self._tables_due_s:
            return _LOOK_S
        after_s = max(_LOOK_S, self._sockets / _AT_REST_PER_S)
        self._tables_due_s = on_the_beat(now_s, after_s) - TOGETHER_S
        tables = [self._fleet.queues.at(bind) for bind in self._fleet.generation.plan.binds]
        if None in tables or not unchanged(tables, self._tables):
            self._tables = tables
            self._look_at_all()
            return 0.0
        self._rests += 1
        if self._rests % _LOOK_AT_ONE == 0:
            there = [each for each in self._fleet.places if each.state is not State.STARTING]
            self._look_at_some(there, 1)
        return _LOOK_S

    @property
    def _sockets(self) -> int:
        return len(self._fleet.places) * len(self._fleet.generation.plan.binds)

    def _forget_those_who_have_gone(self, there: Sequence[Place]) -> None:
        pids = {place.process.pid for place in there if place.process}
        self._suspects = {each for each in self._suspects if each[0] in pids}
        self._told = {each for each in self._told if each[0] in pids}
        self._refused &= pids
        self._out = {place for place in there if place.left}

    def _look_at_some(self, there: Sequence[Place], at_most: int = _AT_ONCE) -> int:
        """How many workers were looked at: no more than there is time for, but one."""
        number, ends_s = 0, self._fleet.clock.read_s() + _LOOKING_S
        for place in self._whose_turn_it_is(there, at_most):
            number += 1
            if place.process:
                look = partial(self._look_at, place, place.process)
                act = f"see whether worker {place.slot} is in its groups"
                self._fleet.retry.attempt(act, look)
            if self._fleet.clock.read_s() >= ends_s:
                break
        return number

    def _whose_turn_it_is(self, places: Sequence[Place], at_most: int) -> Iterator[Place]:
        """All, or where there are many sockets the next of them."""
        first = self._next % max(1, len(places))
        seen = 0
        for place in (*places[first:], *places[:first]):
            if seen >= at_most:
                return
            seen += len(place.generation.plan.binds)
            self._next = (self._next + 1) % len(places)
            yield place

    def _look_at(self, place: Place, worker: Process) -> None:
        with ExitStack() as stack:
            theirs = self._borrow(worker, stack)
            held = self._fleet.steering.held(place.slot)
            ours = {at: stack.enter_context(_duplicate(fd)) for at, fd in enumerate(held)}
            for at, bind in enumerate(worker.launch.binds[: len(worker.bound)]):
                has = None if theirs is None else at in theirs
                sock = (theirs or {}).get(at) or ours.get(at)
                # One that ends may close its sockets when it likes.
                if place.state is not State.STOPPING or at in place.left:
                    self._look_at_one(_Socket(place, worker, at, bind, sock, at in ours, has))

    def _look_at_one(self, one: _Socket) -> None:
        found = departure(one.bind.protocol, self._sight(one))
        if found is None:
            self._is_in(one)
        elif found is not Departure.CLOSED or self._is_certain(one):
            self._mend(one, found, cure(found, self._splits(one)))

    def _mend(self, one: _Socket, found: Departure, how: Cure) -> None:
        self._tell(one, found, how)
        if how is Cure.SHARE and one.sock is not None:
            members.share(one.sock)
        elif how is Cure.REJOIN and one.sock is not None:
            one.place.left.pop(one.at, None)
            self._rejoin(one)
        else:
            self._is_out(one, found)
            if how is Cure.REPLACE and one.place.is_in_service:
                self._replace_if_due(one.place)

    def _splits(self, one: _Socket) -> bool:
        """Whether a socket that is bound now may join a connected one instead of the group."""
        return anchor.is_at_risk(one.at, one.bind, self._fleet.steering.anchors)

    def _is_certain(self, one: _Socket) -> bool:
        """Of one that is closed. Not the first time: a worker that ends closes its sockets as
        well. And a process that is no descendant of the worker may have it."""
        key = (one.worker.pid, one.at)
        if key not in self._suspects:
            self._suspects.add(key)
            return False
        return one.at in one.place.left or not one.is_held or not self._is_open_elsewhere(one)

    def _is_open_elsewhere(self, one: _Socket) -> bool:
        protocol: proc.Protocol = "udp" if one.bind.protocol == "udp" else "tcp"
        there = proc.holders(protocol, one.bind.address, one.bind.port)
        pids = {each.pid for each in there if each.inode == one.inode}
        return not pids <= self._fleet.own_pids

    def _borrow(self, worker: Process, stack: ExitStack) -> Mapping[int, socket.socket] | None:
        """Its sockets by bind, as far as it has them open; None where that cannot be told."""
        if worker.pid in self._refused:
            return None
        try:
            return stack.enter_context(worker.sockets())
        except KernelError as error:
            if error.cause in ("EPERM", "ENOSYS"):
                self._refused.add(worker.pid)
            return None

    def _sight(self, one: _Socket) -> Sighting:
        if self._is_gone(one) or (one.is_held and one.has is False):
            return Sighting(is_open=False)
        is_member = self._fleet.steering.is_member(one.place.slot, one.at)
        shares = members.shares(one.sock) if one.sock else None
        here = (self._fleet.queues.at(one.bind) or {}).get(one.inode)
        if here is None:
            return Sighting(None, None, None, is_member, shares)
        is_on_device = here.device not in (0, self._usual_device)
        return Sighting(True, here.is_connected, is_on_device, is_member, shares)

    def _is_gone(self, one: _Socket) -> bool:
        """Whether nobody has it open, or it does not listen."""
        there = self._fleet.queues.at(one.bind)
        return there is not None and one.inode not in there

    def _is_in(self, one: _Socket) -> None:
        if one.place.left.pop(one.at, None) is not None:
            self._rejoin(one)

    def _rejoin(self, one: _Socket) -> None:
        if one.sock is not None:
            self._fleet.steering.rejoined(one.place.slot, one.at, one.sock)

    def _is_out(self, one: _Socket, found: Departure) -> None:
        place = one.place
        if one.at not in place.left:
            # A listener on a device stays in its group, and so does what we have open ourselves.
            over_udp = one.bind.protocol == "udp" and found is not Departure.CLOSED
            if over_udp or self._is_gone(one):
                self._fleet.steering.lost(place.slot, one.at)
            place.left[one.at] = found
            self._out.add(place)
        may_take_all = one.bind.protocol == "udp" and found in _TAKES_ALL
        if may_take_all and one.sock is not None and self._others_are_in(one):
            members.cut_off(one.sock)

    def _others_are_in(self, one: _Socket) -> bool:
        """Whether somebody is left to get what this one no longer does."""
        return any(
            each.is_in_service and one.at not in each.left
            for each in self._fleet.places
            if each is not one.place
        )

    def _tell(self, one: _Socket, found: Departure, how: Cure) -> None:
        """Once for each process. What is cut off is connected from then on."""
        key = (one.worker.pid, one.at, found)
        if key in self._told or one.at in one.place.left:
            return
        self._told.add(key)
        what = f"worker {one.place.slot}'s socket on {one.bind.label} left the group"
        words = f"{what}: {found.value}; {how.value}"
        self._fleet.log.warning("%s", words)
        notes = self._fleet.group_notes
        if len(notes) >= _NOTES_MAX:
            del notes[next(iter(notes))]
        notes[f"{one.bind.label} {found.name}"] = words

    def _replace_if_due(self, place: Place) -> None:
        now_s = self._fleet.clock.now_s()
        if now_s < place.relief_s:
            return
        tries = self._tries.setdefault(place.seat.number, Tries())
        if tries.begin(now_s):
            place.relief_s = now_s + _AGAIN_S
            self._replace(place)
        elif tries.are_over:
            self._give_up(place)

    def _give_up(self, place: Place) -> None:
        place.relief_s = float("inf")
        words = f"worker {place.slot} is not replaced again for its sockets, as that did not help"
        self._fleet.log.warning("%s", words)
        self._fleet.group_notes[f"seat {place.seat.number}"] = words


def _duplicate(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))
