"""How a table is filled: from the workers that may be chosen to positions. Pure.

The kernel only ever looks a position up. What a policy promises (turns, shares,
that few flows move, that a CPU has its own worker) is kept here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import chain, count, cycle, islice, repeat
from math import gcd

import msgspec

from steer import abi
from steer.policy.cpus import Topology, nearest

MAX_DECK = abi.TURNS // 2


class Member(msgspec.Struct, frozen=True):
    """A slot that may be chosen.

    Args:
        weight: its share is in proportion, 1 or more.
        cpu: the CPU its worker is pinned to; None if to none.
    """

    slot: int
    weight: int = 1
    cpu: int | None = None


class Layout(msgspec.Struct, frozen=True):
    """One half of the table, as far as it is filled.

    Args:
        entries: slots by position, or abi.ROW + where the row starts in `turns`.
        turns: rows, each its length and then its slots.
        spares: live slots to try when the chosen one fails.
        deck: positions until the entries begin anew; 0 where they do not.
    """

    entries: array[int]
    turns: array[int] = msgspec.field(default_factory=lambda: array("H"))
    spares: array[int] = msgspec.field(default_factory=lambda: array("H"))
    deck: int = 0

    def parts(self) -> dict[int, bytes]:
        """The bytes to write, by offset in struct steer_layout."""
        return {
            0: abi.LENGTH.pack(len(self.entries), self.deck),
            abi.ENTRIES_OFFSET: self.entries.tobytes(),
            abi.TURNS_OFFSET: self.turns.tobytes(),
            abi.SPARES_OFFSET: self.spares.tobytes(),
        }

    def row(self, entry: int) -> Sequence[int]:
        """The slots that an entry stands for, in their turns."""
        if not entry & abi.ROW:
            return (entry,)
        start = entry & ~abi.ROW
        return self.turns[start + 1 : start + 1 + self.turns[start]]


def spares(slots: Sequence[int]) -> array[int]:
    """What is tried, from any place on, when the slot that was chosen fails."""
    return array("H", islice(cycle(slots or [abi.NO_SLOT]), abi.SPARES))


def all_to(slot: int, else_to: Sequence[int] = ()) -> Layout:
    """Whatever the policy answers, it is `slot`.

    Args:
        else_to: where nothing listens there, one of these.
    """
    return Layout(array("H", [slot]) * abi.ENTRIES, spares=spares(else_to or [slot]))


EMPTY = all_to(abi.NO_SLOT)
"""Nobody may be chosen: the kernel's hash decides."""


def read(half: bytes) -> Layout:
    """The layout that a half of the table holds; see `Layout.parts`."""
    length, laid = abi.LENGTH.unpack_from(half)
    words = array("H", half[abi.ENTRIES_OFFSET :])
    at_turns = (abi.TURNS_OFFSET - abi.ENTRIES_OFFSET) // words.itemsize
    at_spares = (abi.SPARES_OFFSET - abi.ENTRIES_OFFSET) // words.itemsize
    return Layout(words[:length], words[at_turns:at_spares], words[at_spares:], laid)


def quotas(members: Sequence[Member], length: int) -> dict[int, int]:
    """How many of `length` positions each slot gets: in proportion to its weight.

    First one to everybody; then rounded as Webster did (Sainte-Laguë): the next always
    goes to the slot with the least (2 held + 1) / weight. So nobody gets fewer when another
    goes, as may happen with largest remainders (Balinski and Young, Fair Representation).
    """
    if len({member.weight for member in members}) == 1:
        each, left = divmod(length, len(members))
        lowest = set(sorted(member.slot for member in members)[:left])
        return {member.slot: each + (member.slot in lowest) for member in members}
    total = sum(member.weight for member in members)
    # What is sure leaves at most two positions a member to be claimed one by one.
    sure = max(0, 2 * length - 3 * len(members))
    held = {member.slot: (sure * member.weight + total) // (2 * total) for member in members}
    claims = merge(*(_claims(member, held[member.slot]) for member in members))
    for _, slot in islice(claims, length - sum(held.values())):
        held[slot] += 1
    return held


def _claims(member: Member, held: int) -> Iterator[tuple[float, int]]:
    return ((n and (2 * n + 1) / member.weight, member.slot) for n in count(held))


def deck(members: Sequence[Member], longest: int = MAX_DECK) -> list[int]:
    """The slots in the order of their turns, each as often as it weighs.

    A heavy slot's turns are spread over the whole, not taken in one burst. The
    deck is as short as exact shares allow; past `longest` they are rounded, to one turn
    at least.
    """
    if not members:
        return []
    common = gcd(*(member.weight for member in members))
    counts = {member.slot: member.weight // common for member in members}
    if sum(counts.values()) > longest:
        counts = quotas(members, max(longest, len(members)))
    due = ((2 * turn + 1, 2 * n, slot) for slot, n in counts.items() for turn in range(n))
    return [slot for _, slot in sorted((at / of, slot) for at, of, slot in due)]


def by_share(members: Sequence[Member], longest: int = MAX_DECK) -> Layout:
    """For `random`: positions in exact proportion to the weights."""
    return Layout(array("H", deck(members, longest)), spares=_spares(members))


def by_turn(members: Sequence[Member]) -> Layout:
    """For `round-robin`: one row, at position 0, of everybody's turns."""
    rows = _Rows()
    return Layout(array("H", [rows.entry(deck(members))]), rows.turns, _spares(members))


def by_cpu(members: Sequence[Member], topology: Topology, longest: int = MAX_DECK) -> Layout:
    """For `cpu`: at each CPU number the slots pinned to it or to the nearest manned CPU.

    Args:
        longest: turns of all rows together.
    """
    crews: dict[int, list[Member]] = {}
    for member in members:
        if member.cpu is None:
            raise ValueError(f"slot {member.slot} is pinned to no CPU")
        crews.setdefault(member.cpu, []).append(member)
    homes = nearest(crews, topology)
    rows = _Rows()
    each = longest // len(crews)
    row_of = {cpu: rows.entry(deck(crew, each)) for cpu, crew in crews.items()}
    anyone = row_of[min(row_of)]
    entries = array(
        "H", [row_of[homes[cpu]] if cpu in homes else anyone for cpu in range(max(homes) + 1)]
    )
    return Layout(entries, rows.turns, _spares(members))


def consistent(members: Sequence[Member], previous: Layout | None, length: int) -> Layout:
    """For `hash`: exact shares, and of the positions only those move that have to.

    Maglev (Eisenbud et al., NSDI 2016) fills a table so that balancers which share
    nothing agree on it, and pays with some moves among the survivors. The
    kernel's hash is salted anew at every boot, so there is nobody to agree with:
    the table starts from the one before it instead, and the moves are the fewest
    there can be.

    Args:
        previous: the layout in force, of the same policy, or None. Of another length, it is
            stretched: a number is spread over either alike.
        length: positions.
    """
    room = quotas(members, length)
    entries = array("H", [abi.NO_SLOT]) * length
    if previous is None:
        moving: Sequence[int] = range(length)
    else:
        was = previous.entries
        entries[:] = was if len(was) == length else _stretched(was, length)
        moving = _over_quota(entries, room)
    receivers = chain.from_iterable(repeat(slot, left) for slot, left in room.items())
    for position, slot in zip(moving, receivers, strict=True):
        entries[position] = slot
    return Layout(entries, spares=_spares(members))


def by_load(members: Sequence[Member]) -> Layout:
    """For `least-conn`: a deck, and where rows would be a word for each of its positions: where
    the load of its slot stands, and its scale, the inverse of its weight.

    It is laid anew after its end, as far as a look that starts anywhere in it goes.
    """
    few = len(members) <= abi.ALL
    laid = deck(members, abi.ALL if few else MAX_DECK - abi.NEIGHBOURS)
    lightest = min(member.weight for member in members)
    scales = {
        member.slot: max(1, round(_FULL_SCALE * lightest / member.weight)) for member in members
    }
    entries = laid + list(islice(cycle(laid), abi.ALL if few else abi.NEIGHBOURS))
    words = array("I", [scales[slot] << 16 | slot * abi.LOAD_SIZE for slot in entries])
    turns = array("H", words.tobytes())
    return Layout(array("H", entries), turns, _spares(members), len(laid))


_FULL_SCALE = 0xFFFF


def _stretched(entries: array[int], length: int) -> array[int]:
    return array("H", [entries[at * len(entries) // length] for at in range(length)])


def _over_quota(entries: array[int], room: dict[int, int]) -> list[int]:
    """Positions whose slot may not keep them; what is kept is taken off `room`."""
    moving = []
    for position, slot in enumerate(entries):
        left = room.get(slot, 0)
        if left:
            room[slot] = left - 1
        else:
            moving.append(position)
    return moving


def _spares(members: Sequence[Member]) -> array[int]:
    return spares([member.slot for member in members])


class _Rows:
    """Collects rows; crews that are alike share one."""

    def __init__(self) -> None:
        self.turns = array("H")
        self._known: dict[tuple[int, ...], int] = {}

    def entry(self, slots: Sequence[int]) -> int:
        if len(slots) == 1:
            return slots[0]
        key = tuple(slots)
        if key not in self._known:
            self._known[key] = abi.ROW | len(self.turns)
            self.turns.append(len(slots))
            self.turns.extend(slots)
        return self._known[key]


def shares(layout: Layout) -> Mapping[int, int]:
    """How many positions each slot has."""
    counted: dict[int, int] = {}
    for slot in layout.entries:
        counted[slot] = counted.get(slot, 0) + 1
    return counted
