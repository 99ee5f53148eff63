"""What `run` is given, read without click: the same as with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steer.cli.arguments import TakesCommand, given_command, service_options, with_options
from steer.cli.options import OPTIONS, RUN_OPTIONS, Given, Option, plain

ALL = (*OPTIONS, *RUN_OPTIONS)
NAMES = tuple(name for option in ALL for name in option.names)
VALUES = ("", "x", "1", "a=b", "app:main", "a.b:c", "-", "-1", "-x", "--", "--name", "ü", "{fd}")


@click.command(cls=TakesCommand)
@service_options
@with_options(RUN_OPTIONS)
def by_click(**options: Any) -> Given:
    return Given(options, given_command())


def read_by_click(arguments: Sequence[str]) -> Given:
    found: Given = by_click.main(list(arguments), standalone_mode=False)
    return found


def words() -> st.SearchStrategy[str]:
    value = st.sampled_from(VALUES)
    name = st.sampled_from(NAMES)
    unusual = st.sampled_from(("--help", "-h", "-b:80", "--work", "--demo=1", "--=", "sleep"))
    return st.one_of(name, value, st.builds("{}={}".format, name, value), unusual)


@given(st.lists(words(), max_size=6))
@example(["--name", "", "--pid="])
@example(["-b", ":1", "-b", ":2", "--name=x", "--name", "y", "app:main"])
@example(["--demo", "--demo", "--check-config", "--", "sleep", "--", "-w"])
@example(["--name", "--", "sleep"])
@example(["app:main", "other:main"])
@example(["--hang", "--demo"])
def test_what_is_read_without_click_is_what_click_reads(arguments: list[str]) -> None:
    found = plain(arguments)
    if found is not None:
        by_click = read_by_click(arguments)
        assert found.options == by_click.options
        assert list(found.command) == list(by_click.command)


@pytest.mark.parametrize("option", ALL, ids=lambda option: option.key)
def test_each_option_is_read_without_click(option: Option) -> None:
    value = "1" if option.metavar else True
    for name in option.names:
        found = plain([name, "1"] if option.metavar else [name])
        assert found is not None
        assert found.options[option.key] == ((value,) if option.is_multiple else value)
        others = {key for key, value in found.options.items() if value not in (None, ())}
        assert others == {option.key}


def test_an_app_or_a_command_is_read_without_click() -> None:
    app = plain(["shop:app", "-w", "2"])
    assert app is not None
    assert (app.options["app"], app.command) == ("shop:app", ())
    command = plain(["-w", "2", "--", "uvicorn", "shop:app", "--fd", "{fd}"])
    assert command is not None
    assert command.command == ("uvicorn", "shop:app", "--fd", "{fd}")


@pytest.mark.parametrize(
    "unusual",
    [
        ["--help"],
        ["-h"],
        ["--workrs", "2"],
        ["-w"],
        ["-w2"],
        ["--demo=yes"],
        ["sleep"],
        ["a:b", "c:d"],
        ["--"],
        ["--", "--demo"],
        ["sleep", "--", "1"],
    ],
)
def test_what_is_not_plain_is_left_to_click(unusual: list[str]) -> None:
    """Who then says what is wrong, where anything is."""
    assert plain(unusual) is None
