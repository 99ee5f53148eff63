"""Commands that are read without click."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.cli import ask, main, status

WORDS = ("web", "--json", "--watch", "--quick", "-x", "--", "", "--jso", "a=b", "--json=1")
NUMBERS = ("1", "0", "+2", "-1", "+", "1e3", "99999999", "hash", "./mine.c")
AT = ("--control-socket", "--control-socket=/a", "--control-socket=", "--control-socket=-")
SHARES = ("--weights", "--weights=1,2", "--weights=", "--param", "--param=a=1")


@given(st.lists(st.sampled_from(WORDS + AT), max_size=5))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_status_is_read_without_click_as_with_it(arguments: list[str]) -> None:
    found = status.plain(arguments)
    if found is not None:
        context = main.status.make_context("status", list(arguments))
        assert found == status.Query(**context.params)


@pytest.mark.parametrize("command", ["reload", "scale", "drain", "restart", "policy", "stop"])
@given(arguments=st.lists(st.sampled_from(WORDS + NUMBERS + AT + SHARES), max_size=5))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_an_act_is_read_without_click_as_with_it(command: str, arguments: list[str]) -> None:
    done: list[object] = []

    def note(*given: object, **how: object) -> None:
        done.append((given, how))

    with patch.multiple(ask, perform=note, stop=note):
        act = ask.plain(command, arguments)
        if act is not None:
            act()
            main.cli([command, *arguments], standalone_mode=False)
            assert done[0] == done[1]
