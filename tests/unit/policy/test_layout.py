"""Layouts: turns, shares, few moves, a worker for each CPU; as examples and as properties."""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from steer import abi
from steer.policy import builtin
from steer.policy import layout as table
from steer.policy.builtin import POLICIES, LayoutContext
from steer.policy.cpus import Topology
from steer.policy.layout import MAX_RING, Layout, Member, empty_layout

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def some_members(draw: st.DrawFn, most: int = 24, heaviest: int = 1000) -> list[Member]:
    slots = draw(
        st.lists(st.integers(0, abi.MAX_SLOTS - 1), min_size=1, max_size=most, unique=True)
    )
    return [Member(slot, draw(st.integers(1, heaviest))) for slot in slots]


def members(*weights: int) -> list[Member]:
    return [Member(slot, weight) for slot, weight in enumerate(weights)]


def counts(slots: Sequence[int]) -> dict[int, int]:
    return dict(Counter(slots))


# quotas


@quick
@given(some_members(), st.integers(0, 2000))
def test_quotas_sum_to_the_length(some: list[Member], length: int) -> None:
    given_out = table.quotas(some, length)
    assert set(given_out) == {member.slot for member in some}
    assert sum(given_out.values()) == length
    assert min(given_out.values()) >= 0


@quick
@given(some_members(), st.integers(1, 2000))
def test_nobody_is_left_out_while_there_is_room(some: list[Member], length: int) -> None:
    held = table.quotas(some, length)
    assert sum(count > 0 for count in held.values()) == min(len(some), length)


@quick
@given(some_members(), st.integers(1, 2000))
def test_quotas_are_fair_between_any_two(some: list[Member], length: int) -> None:
    """By Webster's measure: moving a position to another slot would not be fairer."""
    held = table.quotas(some, length)
    for one, other in permutations(some, 2):
        if held[one.slot] > 1:
            assert (2 * held[one.slot] - 1) * other.weight <= (
                2 * held[other.slot] + 1
            ) * one.weight


@quick
@given(some_members(heaviest=10), st.integers(768, 2000))
def test_quotas_are_near_proportion(some: list[Member], length: int) -> None:
    """Within half a position, plus the slot's share of all members' half positions."""
    total = sum(member.weight for member in some)
    held = table.quotas(some, length)
    for member in some:
        off = abs(held[member.slot] - Fraction(length * member.weight, total))
        assert off <= Fraction(1, 2) + Fraction(len(some) * member.weight, 2 * total)


@quick
@given(st.lists(st.integers(0, 4095), min_size=1, max_size=50, unique=True), st.integers(0, 3000))
def test_equal_weights_differ_by_one_at_most(slots: list[int], length: int) -> None:
    """The lowest slots have one more."""
    given_out = table.quotas([Member(slot, 7) for slot in slots], length)
    whole, more = divmod(length, len(slots))
    expected = {slot: whole + (rank < more) for rank, slot in enumerate(sorted(slots))}
    assert given_out == expected


@quick
@given(some_members(), st.integers(1, 2000), st.data())
def test_no_slot_loses_positions_when_another_leaves(
    some: list[Member], length: int, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(some))
    before = table.quotas(some, length)
    after = table.quotas([member for member in some if member != gone], length)
    assert all(after[slot] >= before[slot] for slot in after)


def test_a_case_in_which_largest_remainders_fail() -> None:
    """They give 2, 1 and 13. When slot 1 leaves they give 1 and 15, so slot 0 loses a position."""
    assert table.quotas(members(1, 1, 10), 16) == {0: 1, 1: 1, 2: 14}
    assert table.quotas([Member(0), Member(2, 10)], 16) == {0: 1, 2: 15}


# ring


@quick
@given(some_members(heaviest=60))
def test_ring_is_exact_and_as_short_as_can_be(some: list[Member]) -> None:
    dealt = counts(table.build_ring(some))
    rates = {Fraction(dealt[member.slot], member.weight) for member in some}
    assert len(rates) == 1
    assert rates.pop().numerator == 1, "the same shares fit a shorter ring"


@quick
@given(some_members(most=8, heaviest=20))
def test_ring_is_smooth(some: list[Member]) -> None:
    """Between two turns of one slot, round the end too, any other has its share of turns,
    rounded down or up: so none comes in a burst."""
    dealt = table.build_ring(some)
    total = counts(dealt)
    for one, other in permutations(total, 2):
        share = Fraction(total[other], total[one])
        for between in gaps(dealt, one):
            assert int(share) <= between.count(other) <= -(-share.numerator // share.denominator)


def gaps(ring: Sequence[int], slot: int) -> list[list[int]]:
    """The slots between each two turns of `slot`, around the ring."""
    first = ring.index(slot)
    round_ = [*ring[first:], *ring[:first], slot]
    turns = [turn for turn, other in enumerate(round_) if other == slot]
    return [round_[start + 1 : end] for start, end in pairwise(turns)]


@pytest.mark.parametrize(
    "weights, expected",
    [
        ((1,), [0]),
        ((7,), [0]),
        ((1, 1, 1), [0, 1, 2]),
        ((5, 5), [0, 1]),
        ((2, 1), [0, 1, 0]),
        ((4, 2), [0, 1, 0]),
        ((1, 3), [1, 0, 1, 1]),
        ((5, 1, 1), [0, 0, 0, 1, 2, 0, 0]),
    ],
)
def test_ring(weights: tuple[int, ...], expected: list[int]) -> None:
    assert table.build_ring(members(*weights)) == expected


def test_ring_without_members() -> None:
    assert table.build_ring([]) == []


@pytest.mark.parametrize("longest", [1, 1024, 3000, MAX_RING])
def test_ring_is_no_longer_than_asked_but_for_one_turn_each(longest: int) -> None:
    some = [Member(slot, 991 + slot % 10) for slot in range(1024)]
    dealt = table.build_ring(some, longest)
    assert len(dealt) == max(longest, len(some))
    assert counts(dealt) == table.quotas(some, len(dealt))


def test_a_light_worker_gets_a_turn_too() -> None:
    assert counts(table.build_ring(members(1, 1000, 1000), 100)) == {0: 1, 1: 50, 2: 49}


def test_ring_keeps_exact_shares_up_to_the_longest() -> None:
    assert len(table.build_ring(members(7, 9), 16)) == 16
    assert counts(table.build_ring(members(7, 10), 16)) == table.quotas(members(7, 10), 16)


# by_share, by_turn


def test_by_share_is_the_ring() -> None:
    layout = table.by_share(members(2, 1))
    assert list(layout.entries) == [0, 1, 0]
    assert not layout.turns


def test_by_turn_is_one_row_at_position_0() -> None:
    layout = table.by_turn(members(2, 1))
    assert list(layout.entries) == [abi.ROW]
    assert list(layout.turns) == [3, 0, 1, 0]
    assert list(layout.row(layout.entries[0])) == [0, 1, 0]


def test_by_turn_of_one_needs_no_row() -> None:
    layout = table.by_turn([Member(5, 3)])
    assert list(layout.entries) == [5]
    assert not layout.turns
    assert list(layout.row(5)) == [5]


def test_the_longest_row_has_room() -> None:
    layout = table.by_turn([Member(slot, 991 + slot % 10) for slot in range(1024)])
    assert len(layout.turns) == MAX_RING + 1 <= abi.TURNS


@quick
@given(some_members(most=40))
def test_fallbacks_are_live_slots_in_turn(some: list[Member]) -> None:
    fallbacks = table.by_turn(some).fallbacks
    assert len(fallbacks) == abi.FALLBACKS
    assert set(fallbacks) == {member.slot for member in some}
    assert max(counts(fallbacks).values()) - min(counts(fallbacks).values()) <= 1


# by_cpu


def at_cpus(*cpus: int) -> list[Member]:
    return [Member(slot, 1, cpu) for slot, cpu in enumerate(cpus)]


def rows(layout: Layout) -> dict[int, list[int]]:
    """The slots of each CPU number."""
    return {cpu: list(layout.row(entry)) for cpu, entry in enumerate(layout.entries)}


def topology(possible: Sequence[int], node_of: dict[int, int] | None = None) -> Topology:
    return Topology(tuple(possible), tuple(possible), node_of or {})


def test_a_cpu_has_its_own_worker() -> None:
    layout = table.by_cpu(at_cpus(0, 1, 2), topology(range(3)))
    assert rows(layout) == {0: [0], 1: [1], 2: [2]}
    assert not layout.turns


def test_cpu_numbers_need_not_be_contiguous() -> None:
    """Numbers without a CPU also lead to live slots."""
    layout = table.by_cpu([Member(4, 1, 3), Member(5, 1, 9)], topology([3, 9]))
    found = rows(layout)
    assert (found[3], found[9], len(found)) == ([4], [5], 10)
    assert all(row in ([4], [5]) for row in found.values())


def test_cpus_outside_the_cpuset_are_served_too() -> None:
    layout = table.by_cpu(at_cpus(2, 3), Topology((2, 3), tuple(range(6)), {}))
    assert rows(layout) == {0: [0], 1: [1], 2: [0], 3: [1], 4: [0], 5: [1]}


def test_a_cpu_without_a_worker_is_served_from_its_own_node() -> None:
    nodes = {cpu: cpu // 4 for cpu in range(8)}
    layout = table.by_cpu(at_cpus(0, 4), topology(range(8), nodes))
    assert [row for (row,) in rows(layout).values()] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_more_workers_than_cpus_take_turns() -> None:
    layout = table.by_cpu(at_cpus(0, 1, 0, 1, 0), topology(range(2)))
    assert rows(layout) == {0: [0, 2, 4], 1: [1, 3]}


def test_turns_on_one_cpu_follow_the_weights() -> None:
    crew = [Member(0, 2, 0), Member(1, 4, 0), Member(2, 9, 1)]
    assert rows(table.by_cpu(crew, topology(range(2)))) == {0: [1, 0, 1], 1: [2]}


def test_cpus_with_the_same_workers_share_a_row() -> None:
    layout = table.by_cpu(at_cpus(1, 1), topology(range(64)))
    assert list(layout.turns) == [2, 0, 1]
    assert set(layout.entries) == {abi.ROW}


def test_a_worker_without_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="slot 1 is pinned to no CPU"):
        table.by_cpu([Member(0, 1, 0), Member(1)], topology(range(2)))


@pytest.mark.parametrize("longest, cpus", [(MAX_RING, 512), (768, 100), (768, 512), (1, 7)])
def test_rows_have_room_and_leave_nobody_out(longest: int, cpus: int) -> None:
    crew = [Member(slot, 1 + slot % 997, slot % cpus) for slot in range(1024)]
    layout = table.by_cpu(crew, topology(range(cpus)), longest)
    assert len(layout.turns) <= min(abi.TURNS, longest + 1024 + cpus)
    assert {slot for row in rows(layout).values() for slot in row} == set(range(1024))


@quick
@given(st.data())
def test_every_possible_cpu_gets_all_workers_of_one_cpu(data: st.DataObject) -> None:
    numbers = st.integers(0, 300)
    possible = sorted(data.draw(st.sets(numbers, min_size=1, max_size=40)))
    cpus = data.draw(st.lists(st.sampled_from(possible), min_size=1, max_size=60))
    nodes = {cpu: data.draw(st.integers(0, 3)) for cpu in possible}
    layout = table.by_cpu(at_cpus(*cpus), topology(possible, nodes))
    assert len(layout.entries) == possible[-1] + 1
    crews = {cpu: [slot for slot, at in enumerate(cpus) if at == cpu] for cpu in cpus}
    found = rows(layout)
    for cpu in possible:
        assert found[cpu] in crews.values()
        if cpu in crews:
            assert found[cpu] == crews[cpu]


# consistent


def owned(layout: Layout) -> dict[int, set[int]]:
    """The positions of each slot."""
    found: dict[int, set[int]] = {}
    for position, slot in enumerate(layout.entries):
        found.setdefault(slot, set()).add(position)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 100, 1024])
@pytest.mark.parametrize("heaviest", [1, 10])
def test_shares_are_as_the_weights(workers: int, heaviest: int) -> None:
    """Within 2 %, or within one position if that is more."""
    some = members(*(1 + slot * 7 % heaviest for slot in range(workers)))
    total = sum(member.weight for member in some)
    positions = table.shares(table.consistent(some, None, abi.ENTRIES))
    for member in some:
        due = abi.ENTRIES * member.weight / total
        assert abs(positions[member.slot] - due) <= max(1, 0.02 * due)


@quick
@given(some_members(), st.integers(1, 600), st.data())
def test_when_a_worker_leaves_only_its_positions_move(
    some: list[Member], length: int, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(some))
    stay = [member for member in some if member != gone]
    before = table.consistent(some, None, length)
    after = builtin.build_layout(
        POLICIES["hash"], stay, LayoutContext(topology([0]), length, previous=before)
    )
    moved = {at for at in range(length) if before.entries[at] != after.entries[at]}
    assert moved == owned(before).get(gone.slot, set())


@quick
@given(some_members(), st.integers(1, 600), st.integers(1, 1000))
def test_when_a_worker_joins_only_its_quota_moves(
    some: list[Member], length: int, weight: int
) -> None:
    new = Member(abi.MAX_SLOTS, weight)
    before = table.consistent(some, None, length)
    after = table.consistent([*some, new], before, length)
    moved = {at for at in range(length) if before.entries[at] != after.entries[at]}
    assert moved == owned(after).get(new.slot, set())
    assert len(moved) == table.quotas([*some, new], length)[new.slot]


@quick
@given(st.lists(st.sets(st.integers(0, 12), min_size=1), min_size=1, max_size=12), st.data())
def test_any_history_ends_in_exact_shares(history: list[set[int]], data: st.DataObject) -> None:
    weight = {slot: data.draw(st.integers(1, 50)) for slot in range(13)}
    layout = None
    for live in history:
        some = [Member(slot, weight[slot]) for slot in sorted(live)]
        layout = table.consistent(some, layout, 257)
        quotas = table.quotas(some, 257)
        assert table.shares(layout) == {slot: n for slot, n in quotas.items() if n}


@quick
@given(some_members(most=6, heaviest=5), st.integers(1, 1000))
def test_a_changed_weight_moves_the_fewest(some: list[Member], weight: int) -> None:
    before = table.consistent(some, None, 257)
    changed = [structs.replace(some[0], weight=weight), *some[1:]]
    after = table.consistent(changed, before, 257)
    moved = sum(a != b for a, b in zip(before.entries, after.entries, strict=True))
    quotas, wanted = table.quotas(some, 257), table.quotas(changed, 257)
    assert moved == sum(max(0, wanted[slot] - quotas[slot]) for slot in wanted)


def test_one_at_1024_workers_is_replaced_without_touching_the_others() -> None:
    some = members(*(1 + slot % 10 for slot in range(1024)))
    before = table.consistent(some, None, abi.ENTRIES)
    without = table.consistent(some[:-1], before, abi.ENTRIES)
    again = table.consistent(some, without, abi.ENTRIES)
    assert owned(again)[0] == owned(before)[0]
    assert table.shares(again) == table.shares(before)
    moved = sum(a != b for a, b in zip(before.entries, without.entries, strict=True))
    assert moved == table.shares(before)[1023]


@pytest.mark.parametrize("length", [4097, 5050, 8192, 50050, abi.ENTRIES])
def test_in_a_longer_table_a_flow_stays_where_it_is(length: int) -> None:
    """Positions as steer_spread() in bpf/steer.h computes them, except at the border of two."""
    before = table.consistent(members(1, 2, 3), None, 4096)
    before = table.consistent(members(1, 2, 3, 4), before, 4096)
    after = table.consistent(members(1, 2, 3, 4), before, length)
    numbers = range(0, 2**32, 2**32 // 10007)
    moved = sum(
        before.entries[number * 4096 >> 32] != after.entries[number * length >> 32]
        for number in numbers
    )
    assert moved <= len(numbers) / 50
    assert table.shares(after) == table.quotas(members(1, 2, 3, 4), length)


def test_the_previous_layout_is_left_alone() -> None:
    before = table.consistent(members(1, 1), None, 8)
    entries = array("H", before.entries)
    table.consistent(members(1), before, 8)
    assert before.entries == entries


@pytest.mark.parametrize("previous", [None, empty_layout(), table.by_turn(members(1, 1, 1))])
def test_a_previous_layout_of_another_kind_is_accepted(previous: Layout | None) -> None:
    layout = table.consistent(members(1, 1), previous, abi.ENTRIES)
    assert table.shares(layout) == {0: abi.ENTRIES // 2, 1: abi.ENTRIES // 2}


# by_load


def words(layout: Layout) -> Sequence[int]:
    """The words that bpf/least-conn.c reads: for each position the slot, and a scale."""
    return array("I", layout.turns.tobytes())


def scales(layout: Layout) -> dict[int, int]:
    found = {slot: word >> 16 for slot, word in zip(layout.entries, words(layout), strict=True)}
    expected = [found[slot] << 16 | slot * abi.LOAD_SIZE for slot in layout.entries]
    assert list(words(layout)) == expected, "one for each slot"
    return found


def test_by_load_is_the_ring_repeated() -> None:
    layout = table.by_load(members(1, 3))
    assert layout.ring == 4
    assert list(layout.entries) == [1, 0, 1, 1] * 17, "4 and 64 more"
    assert scales(layout) == {0: 65535, 1: 21845}


@quick
@given(some_members(most=90))
def test_by_load_can_be_scanned_from_anywhere(some: list[Member]) -> None:
    """Past the end the ring repeats, as far as bpf/least-conn.c scans."""
    layout = table.by_load(some)
    far = abi.SCAN_MAX if len(some) <= abi.SCAN_MAX else abi.NEIGHBOURS
    assert len(layout.entries) == len(words(layout)) == layout.ring + far
    assert (layout.ring <= abi.SCAN_MAX) == (len(some) <= abi.SCAN_MAX), "by that the program knows"
    for at, slot in enumerate(layout.entries):
        assert slot == layout.entries[at % layout.ring]
        assert words(layout)[at] == words(layout)[at % layout.ring]


@quick
@given(some_members(most=90))
def test_by_load_leaves_nobody_out(some: list[Member]) -> None:
    layout = table.by_load(some)
    everybody = {member.slot for member in some}
    assert set(layout.entries[: layout.ring]) == set(layout.fallbacks) == everybody


@quick
@given(some_members(most=90, heaviest=6))
def test_a_scan_of_the_whole_ring_sees_everybody_as_often_as_they_weigh(some: list[Member]) -> None:
    """If 64 positions do not suffice for exact shares, they are rounded as in other tables."""
    layout = table.by_load(some)
    longest = abi.SCAN_MAX if len(some) <= abi.SCAN_MAX else MAX_RING - abi.NEIGHBOURS
    drawn = counts(layout.entries[: layout.ring])
    assert drawn == counts(table.build_ring(some, longest))
    # Of equal weights, the lowest slot is rounded up.
    heavy = max(some, key=lambda member: (member.weight, -member.slot))
    assert drawn[heavy.slot] == max(drawn.values())


@quick
@given(some_members())
def test_scales_are_the_inverse_of_the_weights(some: list[Member]) -> None:
    """The lightest slot has the full scale. The others are as exact as 16 bits allow."""
    found = scales(table.by_load(some))
    lightest = min(member.weight for member in some)
    for member in some:
        exact = Fraction(0xFFFF * lightest, member.weight)
        assert abs(found[member.slot] - exact) <= Fraction(1, 2)
        assert 1 <= found[member.slot] <= 0xFFFF
        assert (found[member.slot] == 0xFFFF) == (member.weight == lightest)


def test_a_scale_is_never_zero() -> None:
    """With zero the slot would look idle, whatever its load."""
    assert scales(table.by_load([Member(0, 1), Member(1, 1_000_000)]))[1] == 1


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2), (3, 1, 4, 1, 5), (10, 1), (7, 5)])
def test_connections_that_stay_are_in_proportion_to_the_weights(weights: tuple[int, ...]) -> None:
    """Played as the program does: the lowest load by scale, ties in turn. Nobody has one that
    another, for what it weighs, would have had more room for."""
    layout = table.by_load(members(*weights))
    load, turn = dict.fromkeys(range(len(weights)), 0), 0
    for _ in range(40 * sum(weights)):
        looks = [
            (load[layout.entries[at]] * (words(layout)[at] >> 16), at - turn, at)
            for at in range(turn, turn + layout.ring)
        ]
        at = min(looks)[2] % layout.ring
        load[layout.entries[at]] += 1
        turn = (at + 1) % layout.ring
        for one, other in permutations(range(len(weights)), 2):
            assert (load[one] - 1) / weights[one] <= load[other] / weights[other] + 0.01
    assert load == {slot: 40 * weight for slot, weight in enumerate(weights)}


@pytest.mark.parametrize("workers", [1, 2, 63, 64, 65, 100, 1024, abi.MAX_SLOTS])
def test_by_load_of_many_has_room(workers: int) -> None:
    layout = table.by_load([Member(slot, 1 + slot % 1000) for slot in range(workers)])
    assert len(layout.entries) <= abi.ENTRIES
    assert len(layout.turns) <= abi.TURNS
    assert set(layout.entries) == set(range(workers))


# Layout


@pytest.mark.parametrize("name", list(POLICIES))
def test_with_nobody_the_kernel_decides(name: str) -> None:
    layout = builtin.build_layout(POLICIES[name], [], LayoutContext(topology([0]), 64))
    assert set(layout.entries) == set(layout.fallbacks) == {abi.NO_SLOT}
    assert abi.NO_SLOT > abi.MAX_SLOTS
    assert len(layout.entries) == abi.ENTRIES, "or a position of the table before would remain"
    assert len(layout.fallbacks) == abi.FALLBACKS


@pytest.mark.parametrize(
    "layout",
    [
        empty_layout(),
        table.by_share(members(2, 1)),
        table.by_turn(members(2, 1, 5)),
        table.by_cpu(at_cpus(0, 1, 0), topology(range(5))),
        table.consistent(members(1, 2, 3), None, abi.ENTRIES),
        table.by_load(members(1, 2, 3)),
        table.by_load(members(*range(1, 100))),
    ],
)
def test_parts_read_back_as_struct_steer_layout(layout: Layout) -> None:
    buffer = bytearray(abi.BUFFER_BYTES)
    for offset, data in layout.parts().items():
        buffer[offset : offset + len(data)] = data
    assert len(buffer) == abi.BUFFER_BYTES, "a part runs over the end"
    length, ring, *rest = struct.unpack(f"=II{abi.ENTRIES}H{abi.TURNS}H{abi.FALLBACKS}H", buffer)
    entries, rest = rest[: abi.ENTRIES], rest[abi.ENTRIES :]
    turns, fallbacks = rest[: abi.TURNS], rest[abi.TURNS :]
    assert (length, ring) == (len(layout.entries), layout.ring)
    assert entries[:length] == list(layout.entries)
    assert turns[: len(layout.turns)] == list(layout.turns)
    assert fallbacks == list(layout.fallbacks)
    again = table.read(bytes(buffer))
    assert (again.entries, again.ring, again.fallbacks) == (layout.entries, ring, layout.fallbacks)
    assert again.turns[: len(layout.turns)] == layout.turns


def test_offsets_are_those_of_steer_h() -> None:
    assert abi.ENTRIES_OFFSET == 8
    assert abi.TURNS_OFFSET == 8 + 2 * 65536
    assert abi.FALLBACKS_OFFSET == 8 + 2 * 65536 + 2 * 32768
    assert abi.BUFFER_BYTES == 8 + 2 * (65536 + 32768 + 256)
    assert abi.TABLE_BYTES == 16 + 2 * abi.BUFFER_BYTES


def test_shares_counts_positions() -> None:
    assert table.shares(Layout(array("H", [4, 2, 4]))) == {4: 2, 2: 1}
