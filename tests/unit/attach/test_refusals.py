"""Listeners that could not join are tried again, and told of once."""

from __future__ import annotations

import errno

from steer.attach import refusals
from steer.attach.refusals import Refusals
from steer.attach.wording import BY_PROTOCOL
from steer.errors import Note

TCP = BY_PROTOCOL["tcp"]
SHORT, ELSEWHERE = Note("no descriptor is left"), Note("it is in another array", "see there")


def test_pause_doubles_until_it_joins() -> None:
    made = Refusals()
    assert made.is_due(7, 0.0)
    made.add(7, SHORT, [1], 0.0)
    assert (made.is_due(7, 0.05), made.is_due(7, 0.1), made.next_s) == (False, True, 0.1)
    made.add(7, SHORT, [1], 1.0)
    assert (made.is_due(7, 1.15), made.next_s) == (False, 1.2)
    made.remove(7)
    assert (made.is_due(7, 1.15), made.next_s) == (True, None)


def test_pause_has_a_limit() -> None:
    made = Refusals()
    for _ in range(2000):
        made.add(7, SHORT, [1], 0.0)
    assert made.next_s == 10.0


def test_closed_listeners_are_forgotten() -> None:
    made = Refusals()
    made.add(7, SHORT, [], 0.0)
    made.add(8, SHORT, [], 0.0)
    made.keep({8})
    assert len(made) == 1
    assert made.is_due(7, 0.0)


def test_reason_is_told_once_each_time_it_arises() -> None:
    made = Refusals()
    made.add(7, SHORT, [], 0.0)
    assert not made.untold()
    made.add(7, SHORT, [], 1.0)
    assert list(made.untold()) == [SHORT]
    made.add(7, SHORT, [], 2.0)
    assert not made.untold()
    made.add(7, ELSEWHERE, [], 3.0)
    assert list(made.untold()) == [ELSEWHERE]
    made.remove(7)
    assert not made.untold()
    made.add(7, ELSEWHERE, [], 4.0)
    made.add(7, ELSEWHERE, [], 5.0)
    assert list(made.untold()) == [ELSEWHERE]


def test_words_name_the_listeners_the_reason_and_the_cure() -> None:
    made = Refusals()
    for inode in (7, 8):
        for _ in range(2):
            made.add(inode, refusals.in_another_array(errno.EBUSY).note, [40 + inode], 0.0)
    ((why, refused),) = made.by_reason().items()
    words = refusals.in_words(why, refused, TCP)
    assert "2 listeners (pids 47, 48) are not selected: " in words
    assert "in the sockarray or sockmap of another program; `steer inspect` shows whose" in words


def test_words_name_what_does_not_fit() -> None:
    words = refusals.full_in_words(256, 1, TCP)
    assert "all 256 slots are taken, and 1 listener more gets no connections; " in words
