"""Layouts: how the table is filled from the workers that may be selected. Pure.

Programs only look positions up in the table. What a policy promises (turns, shares, that few
flows move, that each CPU has its own worker) depends on the layout.
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

MAX_RING = abi.TURNS // 2


class Member(msgspec.Struct, frozen=True):
    """A slot that may be selected.

    Args:
        weight: 1 or more; its share of the selections is in proportion.
        cpu: the CPU that its worker is pinned to, or None.
    """

    slot: int
    weight: int = 1
    cpu: int | None = None


class Layout(msgspec.Struct, frozen=True):
    """The content of one buffer of the table.

    Args:
        entries: by position, a slot or abi.ROW + the offset of a row in `turns`.
        turns: rows; each is its length, then its slots.
        fallbacks: live slots to try if the selected slot has no socket.
        ring: length of the ring, after which the entries repeat; 0 if the table is no ring.
    """

    entries: array[int]
    turns: array[int] = msgspec.field(default_factory=lambda: array("H"))
    fallbacks: array[int] = msgspec.field(default_factory=lambda: array("H"))
    ring: int = 0

    def parts(self) -> dict[int, bytes]:
        """The bytes to write, by offset in struct steer_layout."""
        return {
            0: abi.LENGTH.pack(len(self.entries), self.ring),
            abi.ENTRIES_OFFSET: self.entries.tobytes(),
            abi.TURNS_OFFSET: self.turns.tobytes(),
            abi.FALLBACKS_OFFSET: self.fallbacks.tobytes(),
        }

    def row(self, entry: int) -> Sequence[int]:
        """The slots of an entry, in the order of their turns."""
        if not entry & abi.ROW:
            return (entry,)
        start = entry & ~abi.ROW
        return self.turns[start + 1 : start + 1 + self.turns[start]]


def fallbacks(slots: Sequence[int]) -> array[int]:
    """The slots to try, from any index on, if the selected slot has no socket."""
    return array("H", islice(cycle(slots or [abi.NO_SLOT]), abi.FALLBACKS))


def uniform(slot: int, else_to: Sequence[int] = ()) -> Layout:
    """A layout that selects `slot` at every position.

    Args:
        else_to: slots to try if `slot` has no socket.
    """
    return Layout(array("H", [slot]) * abi.ENTRIES, fallbacks=fallbacks(else_to or [slot]))


def empty_layout() -> Layout:
    """A layout without any slot: the kernel's hash selects."""
    return uniform(abi.NO_SLOT)


def read(buffer: bytes) -> Layout:
    """Decode a buffer of the table; the reverse of `Layout.parts`."""
    length, ring = abi.LENGTH.unpack_from(buffer)
    words = array("H", buffer[abi.ENTRIES_OFFSET :])
    at_turns = (abi.TURNS_OFFSET - abi.ENTRIES_OFFSET) // words.itemsize
    at_fallbacks = (abi.FALLBACKS_OFFSET - abi.ENTRIES_OFFSET) // words.itemsize
    return Layout(words[:length], words[at_turns:at_fallbacks], words[at_fallbacks:], ring)


def quotas(members: Sequence[Member], length: int) -> dict[int, int]:
    """How many of `length` positions each slot gets, in proportion to its weight.

    Each slot gets at least one. The rest is rounded by Webster's method (Sainte-Laguë): the
    next position always goes to the slot with the lowest (2 held + 1) / weight. So no slot
    loses positions when another leaves, which can happen with the method of largest
    remainders (Balinski and Young, Fair Representation).
    """
    if len({member.weight for member in members}) == 1:
        each, left = divmod(length, len(members))
        lowest = set(sorted(member.slot for member in members)[:left])
        return {member.slot: each + (member.slot in lowest) for member in members}
    total = sum(member.weight for member in members)
    # At most two positions per member remain to be assigned one by one.
    sure = max(0, 2 * length - 3 * len(members))
    held = {member.slot: (sure * member.weight + total) // (2 * total) for member in members}
    claims = merge(*(_claims(member, held[member.slot]) for member in members))
    for _, slot in islice(claims, length - sum(held.values())):
        held[slot] += 1
    return held


def _claims(member: Member, held: int) -> Iterator[tuple[float, int]]:
    return ((n and (2 * n + 1) / member.weight, member.slot) for n in count(held))


def build_ring(members: Sequence[Member], longest: int = MAX_RING) -> list[int]:
    """The weighted ring: the slots in the order of their turns, each as often as its weight.

    The turns of a heavy slot are spread over the whole ring, not adjacent. The ring is as short
    as exact shares allow. If it were longer than `longest`, shares are rounded, but each slot
    keeps at least one turn.
    """
    if not members:
        return []
    common = gcd(*(member.weight for member in members))
    counts = {member.slot: member.weight // common for member in members}
    if sum(counts.values()) > longest:
        counts = quotas(members, max(longest, len(members)))
    due = ((2 * turn + 1, 2 * n, slot) for slot, n in counts.items() for turn in range(n))
    return [slot for _, slot in sorted((at / of, slot) for at, of, slot in due)]


def by_share(members: Sequence[Member], longest: int = MAX_RING) -> Layout:
    """For `random`: as many positions per slot as its weight."""
    return Layout(array("H", build_ring(members, longest)), fallbacks=_fallbacks(members))


def by_turn(members: Sequence[Member]) -> Layout:
    """For `round-robin`: one row at position 0, with the turns of all slots."""
    rows = _Rows()
    return Layout(array("H", [rows.entry(build_ring(members))]), rows.turns, _fallbacks(members))


def by_cpu(members: Sequence[Member], topology: Topology, longest: int = MAX_RING) -> Layout:
    """For `cpu`: at each CPU number, the slots pinned to it or to the nearest CPU with any.

    Args:
        longest: limit for the turns of all rows together.
    """
    members_at: dict[int, list[Member]] = {}
    for member in members:
        if member.cpu is None:
            raise ValueError(f"slot {member.slot} is pinned to no CPU")
        members_at.setdefault(member.cpu, []).append(member)
    homes = nearest(members_at, topology)
    rows = _Rows()
    each = longest // len(members_at)
    row_of = {cpu: rows.entry(build_ring(pinned, each)) for cpu, pinned in members_at.items()}
    anyone = row_of[min(row_of)]
    entries = array(
        "H", [row_of[homes[cpu]] if cpu in homes else anyone for cpu in range(max(homes) + 1)]
    )
    return Layout(entries, rows.turns, _fallbacks(members))


def consistent(members: Sequence[Member], previous: Layout | None, length: int) -> Layout:
    """For `hash`: exact shares, and as few positions as possible change their slot.

    Maglev (Eisenbud et al., NSDI 2016) fills its table so that balancers without common state
    arrive at the same table; for that some positions move between slots that stay. Here no
    other balancer could agree anyway, as the kernel's hash has a new seed at each boot. So the
    table is made from the previous one, which gives the minimum of moves.

    Args:
        previous: the current layout of the same policy, or None. If its length differs, it is
            stretched, which keeps the slot of a hash.
        length: number of positions.
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
    return Layout(entries, fallbacks=_fallbacks(members))


def by_load(members: Sequence[Member]) -> Layout:
    """For `least-conn`: a ring, and in place of rows a 32-bit word for each of its positions.

    A word is the offset of its slot's load, and the slot's scale, which is the inverse of its
    weight. The ring repeats after its end, so that a scan may start anywhere in it.
    """
    few = len(members) <= abi.SCAN_MAX
    ring = build_ring(members, abi.SCAN_MAX if few else MAX_RING - abi.NEIGHBOURS)
    lightest = min(member.weight for member in members)
    scales = {
        member.slot: max(1, round(_FULL_SCALE * lightest / member.weight)) for member in members
    }
    entries = ring + list(islice(cycle(ring), abi.SCAN_MAX if few else abi.NEIGHBOURS))
    words = array("I", [scales[slot] << 16 | slot * abi.LOAD_SIZE for slot in entries])
    turns = array("H", words.tobytes())
    return Layout(array("H", entries), turns, _fallbacks(members), len(ring))


_FULL_SCALE = 0xFFFF


def _stretched(entries: array[int], length: int) -> array[int]:
    return array("H", [entries[at * len(entries) // length] for at in range(length)])


def _over_quota(entries: array[int], room: dict[int, int]) -> list[int]:
    """Positions that their slot has to give up. Those that it keeps are subtracted from `room`."""
    moving = []
    for position, slot in enumerate(entries):
        left = room.get(slot, 0)
        if left:
            room[slot] = left - 1
        else:
            moving.append(position)
    return moving


def _fallbacks(members: Sequence[Member]) -> array[int]:
    return fallbacks([member.slot for member in members])


class _Rows:
    """Collects rows; equal rows are stored once."""

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
    """The number of positions of each slot."""
    counted: dict[int, int] = {}
    for slot in layout.entries:
        counted[slot] = counted.get(slot, 0) + 1
    return counted
