"""How many workers start at a time: pure."""

from __future__ import annotations

import pytest

from steer.workers.intake import MOST_TOGETHER, QUICK_S, STEP_S, Batch, Intake


@pytest.mark.parametrize(("cpus", "at_once"), [(1, 2), (2, 2), (4, 3), (64, 33)])
def test_one_at_a_time_and_one_more_than_half_the_cpus(cpus: int, at_once: int) -> None:
    intake, starting = Intake(cpus, Batch()), 0
    while room := intake.room(starting):
        assert room == 1
        starting += room
    assert starting == at_once


def test_those_who_are_quick_start_together() -> None:
    intake, together = Intake(2, Batch()), []
    for _ in range(5):
        intake.took(QUICK_S)
        together.append(intake.room(0))
    assert together == [2, 4, 8, 8, 8]


def test_two_lots_are_under_way_and_no_lot_is_cut() -> None:
    intake = Intake(2, Batch())
    for _ in range(5):
        intake.took(0.0)
    most = 2 * MOST_TOGETHER
    assert intake.room(most - MOST_TOGETHER) == MOST_TOGETHER
    assert intake.room(most - MOST_TOGETHER + 1) == intake.room(most) == 0


def test_those_who_are_not_quick_any_more_start_one_at_a_time() -> None:
    intake = Intake(2, Batch())
    for _ in range(5):
        intake.took(0.0)
    together = [(intake.took(QUICK_S + 0.01), intake.room(0))[1] for _ in range(4)]
    assert together == [4, 2, 1, 1]


def test_lot_that_took_long_is_followed_by_smaller_ones() -> None:
    batch = Batch()
    sizes = [(batch.took(STEP_S + 0.001), batch.size)[1] for _ in range(4)]
    assert sizes == [4, 2, 1, 1]
    assert [(batch.took(STEP_S), batch.size)[1] for _ in range(2)] == [1, 1]
    sizes = [(batch.took(STEP_S / 2), batch.size)[1] for _ in range(8)]
    assert sizes == [2, 3, 4, 5, 6, 7, 8, 8]


def test_intake_starts_no_more_together_than_a_lot() -> None:
    batch = Batch()
    intake = Intake(2, batch)
    for _ in range(5):
        intake.took(0.0)
    batch.size = 3
    assert [intake.room(starting) for starting in (0, 3, 4)] == [3, 3, 0]
