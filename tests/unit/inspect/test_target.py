"""What the argument of `steer inspect` means."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.errors import ConfigError
from steer.inspect.target import Target, matches, parse
from testkit.inspection import seen

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    "text, meant",
    [
        (None, Target()),
        ("80", Target(number=80)),
        ("70000", Target(number=70000)),
        (":80", Target(port=80)),
        ("*:80", Target(port=80)),
        ("udp://:53", Target("udp", port=53)),
        ("tcp://*:53", Target("tcp", port=53)),
        ("127.0.0.1:80", Target(None, "127.0.0.1", 80)),
        ("localhost:80", Target(None, "127.0.0.1", 80)),
        ("[::1]:80", Target(None, "::1", 80)),
        ("udp://[::]:53", Target("udp", "::", 53)),
    ],
)
def test_what_is_asked_for(text: str | None, meant: Target) -> None:
    assert parse(text) == meant


@pytest.mark.parametrize(
    "text, words",
    [
        ("nginx", "malformed; allowed: an address"),
        ("", "malformed; allowed: an address"),
        ("0", "not a whole number from 1 to 4194304, as ports and process ids are"),
        ("9" * 30, "not a whole number"),
        (":0", "port 0 is not in 1..65535"),
        (":70000", "port 70000 is not in 1..65535"),
        ("::1:80", "did you mean '[::1]:80'?"),
        ("example.org:80", "no numeric address"),
        ("http://127.0.0.1:80", "did you mean '127.0.0.1:80'?"),
    ],
)
def test_what_cannot_be_is_told(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert words in str(caught.value)


@quick
@given(st.text())
def test_nothing_else_is_ever_raised(text: str) -> None:
    with suppress(ConfigError):
        parse(text)


V4, V6 = "127.0.0.1", "::1"


@pytest.mark.parametrize(
    "wanted, bound, v6only, is_meant",
    [
        (V4, V4, False, True),
        (V4, "127.0.0.2", False, False),
        (V4, "0.0.0.0", False, True),
        (V4, "::", False, True),
        (V4, "::", True, False),
        (V6, "::", True, True),
        (V6, "0.0.0.0", False, False),
        ("0.0.0.0", V4, False, False),
    ],
)
def test_an_address_means_all_that_may_get_what_is_sent_to_it(
    wanted: str, bound: str, v6only: bool, is_meant: bool
) -> None:
    target = Target(address=wanted, port=80)
    assert matches(target, seen(bound, is_v6only=v6only)) == is_meant
    assert not matches(target, seen(bound, 81, is_v6only=v6only))


def test_a_number_is_a_port_first() -> None:
    assert matches(Target(number=80), seen(port=80))
    assert not matches(Target(number=80), seen(port=8080))


def test_a_protocol_is_asked_for_by_name() -> None:
    assert matches(Target("udp", port=80), seen(protocol="udp"))
    assert not matches(Target("udp", port=80), seen())
    assert matches(Target(port=80), seen(protocol="udp"))


def test_nothing_asked_for_is_everything() -> None:
    assert matches(Target(), seen())
