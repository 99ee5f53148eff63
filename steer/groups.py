"""Sees that workers' sockets stay in their groups, and mends it where they do not.

What is to be seen and done is in `membership`; here are the looks. Of all sockets together the
kernel is asked how they stand (`_survey`): whether each is open, to whom it is connected, on which
device. Once a second at most, and the more seldom the more there are, so that it takes no more
time than with a few. What that does not tell (SO_REUSEPORT taken back, a listener that is shut
down and listens again) does nobody any harm until something comes. Then one socket after the
other is looked at closer, which takes a hundred microseconds: no more of them in a second than
`_MOST`. While nothing comes it is one now and then.
"""

from __future__ import annotations

import math
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from steer import anchor
from steer.address import Bind
from steer.errors import KernelError
from steer.fleet import Fleet
from steer.kernel import members, proc, traffic
from steer.lifecycle import State
from steer.looks import TOGETHER_S, on_the_beat
from steer.membership import Cure, Departure, Sighting, Tries, cure, departure
from steer.place import Place
from steer.programs import Programs
from steer.queues import Table

if TYPE_CHECKING:
    from steer.spawn import Process

_LOOK_S = 1.0
_MOST, _AT_ONCE = 128, 16
_LOOKING_S = 0.005
"""So long in one step, however slow the machine is."""
_SURVEYED_PER_S = 250
"""The kernel is asked for so many sockets in a second."""
_SUSPECTED_PER_S = 1000
"""The same while a worker has left a group, or comes."""
_RESTS = 4
"""While nothing comes a worker is looked at closer each so many seconds; each second where a
socket that is out of its group may be the one that takes all."""
_AGAIN_S = 30.0
"""So long after it was asked for, a worker that did not come is asked for again."""
_NOTES_MAX = 32
_TAKES_ALL = (Departure.DISSOLVED, Departure.ON_DEVICE)
"""Over UDP, if the kernel finds it before the group."""


class _Socket(NamedTuple):
    """What is looked at: a worker's socket on one of its addresses.

    Args:
        known: of its worker.
        at: the bind's number.
        sock: a duplicate; None where it cannot be had.
        is_held: whether this controller has it open, too.
        has: whether the worker has it open; None where that cannot be told.
    """

    place: Place
    worker: Process
    known: _Known
    at: int
    bind: Bind
    sock: socket.socket | None
    is_held: bool
    has: bool | None

    @property
    def inode(self) -> int:
        return self.worker.bound[self.at]


class _Known(msgspec.Struct):
    """What is known of a worker; who comes after it in its place is another.

    Args:
        suspected: by bind, the survey by which it seemed to be closed.
        told: what the log has.
        lends: whether we may borrow its sockets.
    """

    pid: int
    suspected: dict[int, int] = {}
    told: set[tuple[int, Departure]] = set()
    lends: bool = True


class Groups:
    """The looks.

    Args:
        replace: asks for another worker, with new sockets, in place of one.
    """

    def __init__(self, fleet: Fleet, replace: Callable[[Place], None]) -> None:
        self._fleet = fleet
        self._replace = replace
        self._pulse: bytes | None = None
        self._tables: dict[Bind, Table | None] = {}
        self._usual_device: int | None = None
        self._surveys = self._rests = 0
        self._has_changed = self._has_come = False
        self._second_due_s = self._surveyed_s = self._survey_due_s = 0.0
        self._is_counted = False
        self._odd: set[Place] = set()
        self._again: deque[Place] = deque()
        self._round: deque[Place] = deque()
        self._now_and_then: dict[Place, None] = {}
        self._tries: dict[int, Tries] = {}
        self._known: dict[Place, _Known] = {}
        self._programs = Programs(fleet)
        self._due = fleet.looks.add("see that sockets stay in their groups", self._look, _LOOK_S)

    def forget(self) -> None:
        """The configuration may be another, and workers do otherwise."""
        self._tries.clear()
        self._fleet.group_notes.clear()
        self._has_changed = self._has_come = True

    def changed(self, place: Place) -> None:
        """A worker is in another state."""
        self._has_changed = True
        self._programs.changed(place)
        if place.state is State.GONE:
            self._known.pop(place, None)
            self._odd.discard(place)
            # It may be an hour before its turn comes.
            self._now_and_then.pop(place, None)

    def _look(self) -> float:
        """At all once a second at most, then closer at some; in how many seconds to go on."""
        if self._fleet.is_ending:
            return math.inf
        now_s = self._fleet.clock.read_s()
        if now_s >= self._second_due_s:
            self._second_due_s = on_the_beat(now_s, _LOOK_S) - TOGETHER_S
            self._look_at_all(now_s)
        self._look_at_some()
        if not (self._again or self._round or self._has_come):
            return _LOOK_S
        return _LOOK_S * _AT_ONCE / min(_MOST, max(_AT_ONCE, self._sockets))

    def _look_at_all(self, now_s: float) -> None:
        came = self._something_came()
        if self._is_survey_due(now_s):
            came |= self._survey()
        if not self._again:
            self._again.extend(self._odd)
        if came:
            self._has_come = True
            look_at_programs = partial(self._programs.look, self._tables.get)
            self._fleet.retry.attempt("see that groups have their program", look_at_programs)
        else:
            self._rest()

    def _something_came(self) -> bool:
        """Or may have."""
        before, self._pulse = self._pulse, self._fleet.steering.pulse()
        self._is_counted = self._pulse is not None
        if not self._is_counted:
            binds = self._fleet.generation.plan.binds
            self._pulse = traffic.pulse({bind.protocol for bind in binds})
        return self._pulse is None or self._pulse != before

    def _rest(self) -> None:
        """Nothing came: now and then look closer at one all the same."""
        self._programs.rest()
        self._rests += 1
        if self._rests % (_RESTS if self._is_counted else 1) == 0 and not self._again:
            if not self._now_and_then:
                self._now_and_then = dict.fromkeys(self._fleet.places)
            if self._now_and_then:
                place = next(iter(self._now_and_then))
                del self._now_and_then[place]
                self._again.append(place)

    @property
    def _sockets(self) -> int:
        return len(self._fleet.places) * len(self._fleet.generation.plan.binds)

    def _is_survey_due(self, now_s: float) -> bool:
        """The more seldom the more sockets there are, as it takes the longer."""
        urgent_s = max(_LOOK_S, self._sockets / _SUSPECTED_PER_S) - TOGETHER_S
        is_urgent = self._has_changed or self._odd
        if now_s < self._survey_due_s and not (is_urgent and now_s >= self._surveyed_s + urgent_s):
            return False
        again_s = max(_LOOK_S, self._sockets / _SURVEYED_PER_S)
        self._surveyed_s, self._survey_due_s = now_s, on_the_beat(now_s, again_s) - TOGETHER_S
        return True

    def _survey(self) -> bool:
        """Ask the kernel how all sockets stand; whether something may have come that was not
        counted."""
        binds = self._fleet.generation.plan.binds
        before, self._tables = self._tables, {bind: self._fleet.queues.at(bind) for bind in binds}
        self._surveys += 1
        self._usual_device = None
        is_untold = None in self._tables.values()
        if all(self._tables[bind] is before.get(bind) for bind in binds) and not self._has_changed:
            return is_untold
        self._has_changed = False
        self._odd.update(filter(self._is_odd, self._fleet.places))
        return is_untold or not (self._is_counted or self._are_all_empty())

    def _are_all_empty(self) -> bool:
        return not any(
            row.queued for table in self._tables.values() for row in (table or {}).values()
        )

    def _is_odd(self, place: Place) -> bool:
        """Whether its sockets do not stand as they should, as far as a survey tells."""
        worker = place.process
        # One that ends may close its sockets when it likes.
        if worker is None or place.state in (State.STARTING, State.STOPPING):
            return False
        return any(
            (table := self._tables.get(bind)) is not None and self._stands_otherwise(table, inode)
            for bind, inode in zip(worker.launch.binds, worker.bound, strict=False)
        )

    def _stands_otherwise(self, table: Table, inode: int) -> bool:
        here = table.get(inode)
        return here is None or here.is_connected or self._is_unusual(here.device)

    def _is_unusual(self, device: int) -> bool:
        """Whether a socket that is bound to this device is bound as new ones are not."""
        if not device:
            return False
        if self._usual_device is None:
            self._usual_device = members.usual_device()
        return device != self._usual_device

    def _look_at_some(self) -> None:
        """Closer, at no more than there is time for, but one."""
        seen, ends_s = 0, self._fleet.clock.read_s() + _LOOKING_S
        for place in self._whose_turn_it_is():
            if place.process and _is_there(place):
                look = partial(self._look_at, place, place.process)
                act = f"see whether worker {place.slot} is in its groups"
                self._fleet.retry.attempt(act, look)
                seen += len(place.generation.plan.binds)
            if seen >= _AT_ONCE or self._fleet.clock.read_s() >= ends_s:
                return

    def _whose_turn_it_is(self) -> Iterator[Place]:
        """First those of whom something is known, then all others, each once since something
        came."""
        if not self._round and self._has_come:
            self._has_come = False
            # Who starts now was not there when it came.
            self._round.extend(filter(_is_there, self._fleet.places))
        while self._again or self._round:
            yield (self._again or self._round).popleft()

    def _look_at(self, place: Place, worker: Process) -> None:
        known = self._known.get(place)
        if known is None or known.pid != worker.pid:
            known = self._known[place] = _Known(worker.pid)
        with ExitStack() as stack:
            theirs = self._borrow(worker, known, stack)
            held = self._fleet.steering.held(place.slot)
            ours = {at: stack.enter_context(_duplicate(fd)) for at, fd in enumerate(held)}
            for at, bind in enumerate(worker.launch.binds[: len(worker.bound)]):
                has = None if theirs is None else at in theirs
                sock = (theirs or {}).get(at) or ours.get(at)
                if place.state is not State.STOPPING or at in place.left:
                    self._look_at_one(
                        _Socket(place, worker, known, at, bind, sock, at in ours, has)
                    )
        if place.left or known.suspected:
            self._odd.add(place)
        else:
            self._odd.discard(place)
            # It may be an hour before its turn comes.
            self._now_and_then.pop(place, None)

    def _look_at_one(self, one: _Socket) -> None:
        found = departure(one.bind.protocol, self._sight(one))
        if found is not Departure.CLOSED:
            one.known.suspected.pop(one.at, None)
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
        """Of one that is closed. Not by one survey alone: a worker that ends closes its sockets
        as well. And a process that is no descendant of the worker may have it."""
        if one.known.suspected.setdefault(one.at, self._surveys) == self._surveys:
            return False
        return one.at in one.place.left or not one.is_held or not self._is_open_elsewhere(one)

    def _is_open_elsewhere(self, one: _Socket) -> bool:
        protocol: proc.Protocol = "udp" if one.bind.protocol == "udp" else "tcp"
        there = proc.holders(protocol, one.bind.address, one.bind.port)
        pids = {each.pid for each in there if each.inode == one.inode}
        return not pids <= self._fleet.own_pids

    def _borrow(
        self, worker: Process, known: _Known, stack: ExitStack
    ) -> Mapping[int, socket.socket] | None:
        """Its sockets by bind, as far as it has them open; None where that cannot be told."""
        if not known.lends:
            return None
        try:
            return stack.enter_context(worker.sockets())
        except KernelError as error:
            known.lends = error.cause not in ("EPERM", "ENOSYS")
            return None

    def _sight(self, one: _Socket) -> Sighting:
        if self._is_gone(one) or (one.is_held and one.has is False):
            return Sighting(is_open=False)
        is_member = self._fleet.steering.is_member(one.place.slot, one.at)
        shares = members.shares(one.sock) if one.sock else None
        here = (self._tables.get(one.bind) or {}).get(one.inode)
        if here is None:
            return Sighting(None, None, None, is_member, shares)
        return Sighting(True, here.is_connected, self._is_unusual(here.device), is_member, shares)

    def _is_gone(self, one: _Socket) -> bool:
        """Whether nobody has it open, or it does not listen."""
        there = self._tables.get(one.bind)
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
        if (one.at, found) in one.known.told or one.at in one.place.left:
            return
        one.known.told.add((one.at, found))
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


def _is_there(place: Place) -> bool:
    return place.process is not None and place.state not in (State.STARTING, State.GONE)


def _duplicate(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))
