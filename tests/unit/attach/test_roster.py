"""Which listeners of an attached group are selected."""

from __future__ import annotations

import pytest

from steer.attach.roster import Member, Roster, Slots, State
from steer.sockets.sock_diag import Listener


def listener(inode: int) -> Listener:
    return Listener(0, 128, inode=inode, address=bytes(4), device=0, uid=0, cookie=inode, cgroup=1)


def roster(*ready: int, starting: tuple[int, ...] = ()) -> Roster:
    """With listeners of these inodes."""
    made = Roster(Slots(8))
    for inode in (*ready, *starting):
        member = made.add(listener(inode), (), 0.0, made.free_slot(inode))
        member.state = State.READY if inode in ready else State.STARTING
    return made


def inodes(members: list[Member]) -> list[int]:
    return [each.listener.inode for each in members]


def test_slots_are_given_from_the_lowest() -> None:
    made = roster(10, 11, 12)
    made.remove(made.gone({10: 0, 12: 0}.keys())[0])
    assert made.free_slot(0) == 1


def test_listeners_get_the_slots_that_they_had() -> None:
    made = Roster(Slots(4))
    with made.wanted({10: 2, 11: 0, 12: 9}):
        assert [made.free_slot(inode) for inode in (10, 11, 12, 13)] == [2, 0, 1, 1]
        made.add(listener(10), (), 0.0, made.free_slot(10))
    assert [made.free_slot(inode) for inode in (11, 14)] == [0, 0]


def test_full_roster_has_no_slot() -> None:
    made = roster(*range(10, 18))
    with pytest.raises(LookupError):
        made.free_slot(0)


def test_unknown_listeners_are_new_in_the_order_of_their_inodes() -> None:
    there = {inode: listener(inode) for inode in (13, 12, 10)}
    assert [each.inode for each in roster(10).new(there)] == [12, 13]


def test_what_is_not_there_is_gone() -> None:
    assert inodes(roster(10, 11).gone({11})) == [10]


def test_only_those_that_are_waited_on_are_admitted_while_others_serve() -> None:
    made = roster(10, starting=(11, 12))
    assert inodes(made.admit({12})) == [12]
    assert inodes(made.selected) == [10, 12]


def test_all_are_admitted_if_nobody_serves() -> None:
    made = roster(starting=(11, 12))
    assert inodes(made.admit(set())) == [11, 12]


@pytest.mark.parametrize("state", [State.DRAINING, State.CLOSING])
def test_who_drains_or_closes_does_not_serve(state: State) -> None:
    made = roster(10, starting=(11,))
    made.selected[0].state = state
    assert inodes(made.admit(set())) == [11]
    assert inodes(made.selected) == [11]
