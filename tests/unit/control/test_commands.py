"""The table of commands agrees with all that reads it."""

from __future__ import annotations

import click
import pytest

from steer.cli import ask, main
from steer.control import outcomes
from steer.control.commands import COMMANDS
from steer.controller import requests


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
    assert {kind.__name__ for kind in outcomes._KINDS} == {
        each.outcome for each in COMMANDS.values() if each.outcome
    }


def test_the_controller_handles_each() -> None:
    assert requests.HANDLERS.keys() == COMMANDS.keys()
