"""What keeps one program from selecting among all sockets of an address."""

from __future__ import annotations

import pytest

from steer.attach import ownership


@pytest.mark.parametrize(
    "groups, words",
    [
        ([7, 7, 7], None),
        ([], None),
        ([7, 8, 7], "the sockets are in 2 groups"),
        ([7, 0, 7], "1 socket of the server was connected or bound to an interface once"),
        ([7, 0, 8], "1 socket of the server was"),
    ],
)
def test_group_is_one_or_it_is_told_why_not(groups: list[int], words: str | None) -> None:
    found = ownership.split(groups)
    assert found is None if words is None else found is not None and words in found.found
