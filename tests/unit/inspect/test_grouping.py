"""Which sockets belong together."""

from __future__ import annotations

from itertools import permutations

import pytest

from steer.inspect.grouping import groups, kind_of, servers
from steer.inspect.seen import SeenProgram
from testkit.inspection import process, seen

OWN = 1
PROGRAM = SeenProgram(9, 5, "p", "ab", 0, 0, 0)


def test_the_kernels_groups_are_the_groups() -> None:
    """Whatever their addresses are: that of one user is not that of another."""
    found = groups([seen(group=7), seen(group=8), seen(group=7)], OWN)
    assert [len(each) for each in found] == [2, 1]


def test_sockets_without_a_group_are_each_one() -> None:
    found = groups([seen(group=0, kernel_address=n) for n in (1, 2)], OWN)
    assert [len(each) for each in found] == [1, 1]


def test_where_groups_are_not_known_the_address_is_one() -> None:
    same = [seen(inode=1), seen(inode=2)]
    others = [seen("127.0.0.2"), seen(port=81), seen(protocol="udp"), seen(netns=2), seen(device=3)]
    assert [len(each) for each in groups([*same, *others], OWN)].count(2) == 1
    assert len(groups([*same, *others], OWN)) == 1 + len(others)


def test_a_v6_wildcard_may_stand_twice() -> None:
    assert len(groups([seen("::", is_v6only=True), seen("::", is_v6only=False)], OWN)) == 2


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_ours_come_first_then_by_port_and_wildcards_last(order: tuple[int, ...]) -> None:
    sockets = [seen(port=80), seen("0.0.0.0", 80), seen(port=443), seen(port=22, netns=9)]
    found = groups([sockets[index] for index in order], OWN)
    assert [each[0] for each in found] == sockets


def test_a_group_of_several_is_reuseport() -> None:
    assert kind_of([seen(), seen()], {}) == "reuseport"


def test_one_that_has_a_program_is_reuseport() -> None:
    assert kind_of([seen(program=PROGRAM)], {}) == "reuseport"


def test_one_of_a_group_whose_others_are_not_shown_is_reuseport() -> None:
    assert kind_of([seen(members=2)], {}) == "reuseport"


@pytest.mark.parametrize(
    "waits, kind",
    [
        (["epoll"], "single"),
        (["no", "epoll"], "single"),
        (["no", "epoll", "accept"], "shared"),
        ([None, None], "shared"),
        ([], "single"),
        (["no", "no"], "single"),
    ],
)
def test_one_that_several_wait_for_is_shared(waits: list[str | None], kind: str) -> None:
    holders = [process(pid, how) for pid, how in enumerate(waits)]
    assert kind_of([seen()], {10: holders}) == kind


@pytest.mark.parametrize(
    "waits, kind", [([], "unknown"), (["epoll"], "unknown"), (["epoll", "epoll"], "shared")]
)
def test_one_that_hidden_processes_may_hold_is_not_called_single(
    waits: list[str], kind: str
) -> None:
    holders = [process(pid, how) for pid, how in enumerate(waits)]
    assert kind_of([seen()], {10: holders}, {10}) == kind
    assert kind_of([seen(inode=11)], {}, {10}) == "single"


def test_those_that_cannot_be_seen_count_where_nobody_is_seen_to_wait() -> None:
    unknown, waiting = process(1, None), process(2)
    assert servers([unknown, waiting]) == [waiting]
    assert servers([unknown, process(3, "no")]) == [unknown]
