"""How tables and prose fit a terminal's width."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.cli import tables
from steer.cli.drawing import Styles, draw
from steer.cli.fit import fit
from steer.cli.tables import Table

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


COLUMNS = ("slot", "pid", "state", "gen", "cpus", "weight", "selected", "open", "queued")


BUSY = Table(
    "web  running  least-conn on ebpf  tcp://127.0.0.1:8080, tcp://127.0.0.1:8081  pid 1234567",
    (*COLUMNS, "restarts", "up"),
    [
        ("0", "1234567", "ready", "1", "0-3,8-11", "1", "12345678", "1000", "3", "0", "10d04h"),
        ("1", "1234568", "draining", "1", "0-3,8-11", "2", "9", "3", "0", "0", "10d04h"),
    ],
    optional=("weight", "gen", "restarts", "cpus", "up", "pid"),
    verdicts="state",
    is_prose=False,
)


PROSE = Table(
    "",
    ("topic", "found", "what would help"),
    [
        (
            "bcc",
            "not installed: own policies cannot be compiled",
            "apt-get install python3-bpfcc",
        )
    ],
)


def test_columns_that_say_nothing_go_first() -> None:
    fitted = fit(BUSY, 80)
    assert set(BUSY.columns) - set(fitted.columns) == {"gen", "restarts"}
    assert fitted.below == ["no room for: gen, restarts"]
    assert [len(row) for row in fitted.rows] == [len(fitted.columns)] * 2
    assert fitted.title.split("\n") == [
        "web  running  least-conn on ebpf  tcp://127.0.0.1:8080, tcp://127.0.0.1:8081",
        "pid 1234567",
    ]
    assert tables.plain(fit(BUSY, 200)) == tables.plain(BUSY)


@given(st.integers(1, 200))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_lines_are_no_wider_than_they_have_to_be(width: int) -> None:
    fitted = fit(BUSY, width)
    lines = tables.plain(fitted).split("\n")
    least = ["slot", "state", "selected", "open", "queued"]
    assert [name for name in fitted.columns if name in least] == least
    if width >= 41:
        assert max(map(len, lines)) <= width
    elif width < 36:
        assert list(fitted.columns) == least


@pytest.mark.parametrize("table", [BUSY, PROSE], ids=["rows", "prose"])
@pytest.mark.parametrize("width", [5, 20, 33, 80, 200])
def test_nothing_is_cut_off_where_nothing_fits(table: Table, width: int) -> None:
    drawn = [_CODES.sub("", line) for line in draw([table], width, Styles())]
    fitted = tables.plain(fit(table, width))
    assert sorted("".join(drawn).replace(" ", "")) == sorted("".join(fitted.split()))
    if width >= 41:
        assert max(map(len, drawn)) <= width


def test_what_fits_is_drawn_as_it_is_written_to_a_file() -> None:
    drawn = draw([BUSY, PROSE], 200, Styles())
    assert [_CODES.sub("", line) for line in drawn] == [
        *tables.plain(BUSY).split("\n"),
        "",
        *tables.plain(PROSE).split("\n"),
    ]
    assert draw([BUSY], 200, Styles(has_any=False)) == tables.plain(BUSY).split("\n")


def test_prose_is_broken_between_words() -> None:
    assert [_CODES.sub("", line) for line in draw([PROSE], 40, Styles())] == [
        "topic  found             what would help",
        "bcc    not installed:    apt-get install",
        "       own policies      python3-bpfcc",
        "       cannot be",
        "       compiled",
    ]


def test_nothing_tells_the_terminal_to_do_something() -> None:
    table = Table("a\x1b[2J", ("b\x07",), [("c\x1b]0;x\x07",)], ["d\r"])
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", "\n".join(draw([table], 80, Styles(False))))
