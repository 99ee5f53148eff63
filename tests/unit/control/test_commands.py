"""The table of commands agrees with all that reads it."""

from __future__ import annotations

import inspect

import click
import pytest

from steer.cli import ask, main
from steer.control import outcomes
from steer.control.commands import COMMANDS
from steer.controller.requests import Requests


def test_each_is_a_command_of_the_command_line() -> None:
    assert COMMANDS.keys() <= main.cli.commands.keys()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "status"])
def test_the_command_line_takes_the_argument_of_the_table(name: str) -> None:
    (argument,) = (p for p in main.cli.commands[name].params if isinstance(p, click.Argument))
    words = (argument.metavar or "").split()
    assert words[1:] == ([COMMANDS[name].argument] if COMMANDS[name].argument else [])


def test_what_is_told_when_it_is_done_names_one_command() -> None:
    done = [command.done for command in COMMANDS.values() if command.done]
    assert len(set(done)) == len(done) == len(ask.COMMANDS)


@pytest.mark.parametrize("name", [name for name, each in COMMANDS.items() if each.outcome])
def test_outcomes_are_those_of_the_table(name: str) -> None:
    assert outcomes.outcome_of(name).__name__ == COMMANDS[name].outcome


def test_each_outcome_is_of_some_command() -> None:
    assert outcomes._BY_NAME.keys() == {each.outcome for each in COMMANDS.values() if each.outcome}


def test_the_controller_handles_each() -> None:
    assert all(inspect.iscoroutinefunction(getattr(Requests, name)) for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "status"])
def test_options_of_the_table_are_options_of_the_command_line(name: str) -> None:
    options = {
        p.name: p.is_flag for p in main.cli.commands[name].params if isinstance(p, click.Option)
    }
    row = COMMANDS[name]
    assert dict.fromkeys(row.flags, True) | dict.fromkeys(row.options, False) == {
        key: is_flag
        for key, is_flag in options.items()
        if key not in ("as_json", "control_socket", "params")
    }
