"""What a policy in force lays out, and how often. No kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from steer import abi
from steer.backends.loaded_policy import LoadedPolicy
from steer.policy import builtin, layout
from steer.policy.builtin import LayoutContext, Policy
from steer.policy.layout import Layout, Member
from testkit.growth_fakes import plan_for

THREE = [Member(slot) for slot in range(3)]


class Laid:
    """Counts what is laid out, and does it."""

    def __init__(self) -> None:
        self.times = 0
        self._build = builtin.build_layout

    def __call__(self, chosen: Policy, members: Any, context: LayoutContext) -> Layout:
        self.times += 1
        return self._build(chosen, members, context)


@pytest.fixture
def laid(monkeypatch: pytest.MonkeyPatch) -> Laid:
    counts = Laid()
    monkeypatch.setattr(builtin, "build_layout", counts)
    return counts


def chosen_by(name: str) -> LoadedPolicy:
    memory = bytearray(abi.TABLE_BYTES)
    maps = {
        "table": SimpleNamespace(memory=lambda: SimpleNamespace(view=memoryview(memory))),
        "params": SimpleNamespace(put=lambda *_: None),
    }
    chosen = LoadedPolicy(plan_for(3, name), cast(Any, maps), [], True)
    chosen._table.clear()
    return chosen


def slots(chosen: LoadedPolicy) -> dict[int, int]:
    shares = dict(layout.shares(layout.read(chosen._table.active())))
    return {slot: number for slot, number in shares.items() if slot != abi.NO_SLOT}


def test_the_same_members_are_laid_out_once(laid: Laid) -> None:
    chosen = chosen_by("hash")
    for _ in range(3):
        chosen.steer(list(THREE), layout.empty_layout())
    assert laid.times == 1


def test_also_after_nobody_was_there(laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.loader.shared_memory.wait_for_programs", lambda: None)
    chosen = chosen_by("hash")
    chosen.steer(THREE, layout.empty_layout())
    before = slots(chosen)
    chosen.steer([], layout.empty_layout())
    assert slots(chosen) == {}
    chosen.steer(THREE, layout.empty_layout())
    assert slots(chosen) == before
    assert laid.times == 1


def test_others_are_laid_out_anew(laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.loader.shared_memory.wait_for_programs", lambda: None)
    chosen = chosen_by("hash")
    chosen.steer(THREE, layout.empty_layout())
    chosen.steer(THREE[:2], layout.empty_layout())
    assert set(slots(chosen)) == {0, 1}
    chosen.steer([*THREE[:2], Member(2, weight=2)], layout.empty_layout())
    assert slots(chosen)[2] > slots(chosen)[0]
    assert laid.times == 3


def test_another_plan_is_laid_out_anew(laid: Laid) -> None:
    chosen = chosen_by("hash")
    chosen.steer(THREE, layout.empty_layout())
    chosen.become(plan_for(200, "hash"))
    chosen._table.assume_no_readers()
    chosen.steer(THREE, layout.empty_layout())
    assert laid.times == 2


def test_who_takes_the_place_of_another_lays_out_what_that_had_not(laid: Laid) -> None:
    first, second = chosen_by("hash"), chosen_by("hash")
    first.steer(THREE, layout.empty_layout())
    second.follow(first)
    second.steer(THREE, layout.empty_layout())
    assert slots(second) == slots(first)
    assert laid.times == 1
