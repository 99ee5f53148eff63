"""Whether a socket is still in its group: judged by counters."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from steer.backends.membership import (
    Advice,
    Bypass,
    Departure,
    Sighting,
    Tries,
    departure,
)
from steer.health.programs import SelectionCheck

D = Departure


@pytest.mark.parametrize(
    ("protocol", "seen", "expected"),
    [
        ("tcp", Sighting(), None),
        ("udp", Sighting(), None),
        ("tcp", Sighting(True, False, False, True, True), None),
        ("udp", Sighting(True, False, False, True, True), None),
        ("tcp", Sighting(False), D.CLOSED),
        ("udp", Sighting(False), D.CLOSED),
        ("udp", Sighting(True, True, False, False, True), D.CONNECTED),
        ("udp", Sighting(True, False, True, False, True), D.ON_DEVICE),
        ("tcp", Sighting(True, False, True, True, True), D.ON_DEVICE),
        ("udp", Sighting(True, False, False, False, True), D.DISSOLVED),
        ("tcp", Sighting(True, False, False, False, True), D.RELISTENS),
        ("udp", Sighting(True, False, False, True, False), D.ALONE),
        ("tcp", Sighting(shares=False), D.ALONE),
        ("udp", Sighting(is_member=False), D.DISSOLVED),
    ],
)
def test_departures(protocol: str, seen: Sighting, expected: Departure | None) -> None:
    assert departure(protocol, seen) is expected


def test_replacements_are_ever_more_seldom_and_then_none() -> None:
    tries = Tries()
    begun = [now_s for now_s in range(500) if tries.begin(now_s)]
    assert begun == [0, 2, 12]
    assert tries.are_over


def test_replacements_of_long_ago_do_not_count() -> None:
    tries = Tries()
    assert [now_s for now_s in (0, 1000, 2000, 3000, 4000) if tries.begin(now_s)]
    assert not tries.are_over


def advice(*looks: tuple[int, Mapping[int, int]]) -> list[Advice]:
    bypass = Bypass()
    return [bypass.look(*look) for look in looks]


def test_a_program_that_chooses_is_ours() -> None:
    assert set(advice(*[(chosen, {1: chosen}) for chosen in range(20)])) == {Advice.NOTHING}


def test_a_program_that_chooses_nobody_is_attached_again_now_and_then() -> None:
    found = advice(*[(7, {1: 3, 2: 0})] * 12)
    assert [at for at, each in enumerate(found) if each is Advice.ATTACH] == [4, 8]
    assert Advice.TELL not in found


def test_what_arrives_and_was_not_chosen_is_told_of() -> None:
    found = advice(*[(7, {1: number, 2: 0}) for number in range(4)])
    assert found == [Advice.NOTHING] * 3 + [Advice.TELL]
    late = advice((7, {1: 0}), (7, {1: 1}), (8, {1: 2}), (8, {1: 3}), (8, {1: 0}), (8, {1: 1}))
    assert Advice.TELL not in late


class Counters:
    """Of slots: how often each was chosen, and which were read."""

    def __init__(self, number: int) -> None:
        self.selected = dict.fromkeys(range(number), 0)
        self.check = SelectionCheck()
        self.read = 0

    def _read(self, slot: int) -> int:
        self.read += 1
        return self.selected[slot]

    def look(self, at_most: int) -> int | None:
        return self.check.look(self.selected, self._read, at_most)


@pytest.mark.parametrize("number", [1, 3, 64, 1000])
def test_it_is_told_by_few_counters_that_nobody_is_chosen(number: int) -> None:
    counters = Counters(number)
    looks = [counters.look(65) for _ in range(60)]
    assert set(looks[: number // 65]) <= {None}
    assert {each for each in looks if each is not None} == {0}
    assert counters.read <= 60 * 65


def test_who_is_chosen_is_found_wherever_it_is() -> None:
    counters = Counters(1000)
    for slot in (0, 999, 500, 500, 1):
        before = counters.check._changes
        counters.selected[slot] += 1
        looks = [counters.look(65) for _ in range(2 * 1000 // 65)]
        assert before + 1 in looks


def test_while_all_are_chosen_one_counter_is_enough() -> None:
    counters = Counters(1000)
    counters.look(65)
    for time in range(1, 50):
        counters.read = 0
        counters.selected = {slot: chosen + 1 for slot, chosen in counters.selected.items()}
        assert counters.look(65) == time
        assert counters.read == 1


def test_a_slot_that_somebody_else_has_now_is_no_proof_for_ever() -> None:
    counters = Counters(3)
    counters.selected[1] = 7
    assert counters.look(65) == 1
    del counters.selected[1]
    assert {counters.look(65) for _ in range(10)} == {1}
