"""Values of a server's options, from their texts, by the types that the server declares."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from os import PathLike
from typing import Any, Literal

import pytest

from steer.child.launch import Unloadable
from steer.child.servers import options
from steer.values import Invalid


@pytest.mark.parametrize(
    "text, declared, value",
    [
        ("5", int, 5),
        ("5", str, "5"),
        ("5", int | str | None, 5),
        ("2.5", float | None, 2.5),
        ("2", float, 2.0),
        ("null", float | None, None),
        ("true", bool, True),
        ("False", bool, False),
        ("info", str | int | None, "info"),
        ("*", list[str] | str | None, "*"),
        ('["a","b"]', list[str] | str | None, ["a", "b"]),
        ('[["x-a","b"]]', list[tuple[str, str]] | None, [("x-a", "b")]),
        ("/srv/key.pem", str | PathLike[str] | None, "/srv/key.pem"),
        ("/srv/key.pem", PathLike[str], "/srv/key.pem"),
        ("h11", type[object] | Literal["auto", "h11"] | str, "h11"),
        ('{"version":1}', dict[str, Any] | str | None, {"version": 1}),
        ('["h2"]', list, ["h2"]),
        ("text", Any, "text"),
        ("CERT_REQUIRED", ssl.VerifyMode | None, ssl.VerifyMode.CERT_REQUIRED),
    ],
)
def test_value(text: str, declared: Any, value: object) -> None:
    found = options.value_of(text, declared)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text, declared, why",
    [
        ("x", int, "not a whole number"),
        ("x", int | None, "not a whole number"),
        ("x", bool, "not true or false"),
        ("shop:notify", Callable[..., None] | None, "an object of Python"),
        ("1", Literal["auto", "h11"], "unknown"),
        ("CERT_REQUIRE", ssl.VerifyMode | None, "unknown"),
    ],
)
def test_value_of_another_type(text: str, declared: Any, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        options.value_of(text, declared)


def test_options_by_name() -> None:
    given = ("a=1", "b=x=y")
    assert options.read("s 1.0", given, {"a": int, "b": str}, {}) == {"a": 1, "b": "x=y"}


@pytest.mark.parametrize(
    "given, said",
    [
        ("thread=1", "server option thread: s 1.0 has no such option; did you mean 'threads'?"),
        ("zzz=1", "server option zzz: s 1.0 has no such option"),
        ("hots=1", "server option hots: s 1.0 has no such option"),
        ("host=1", "server option host: steer sets it; use --bind"),
        ("threads=x", "server option threads = 'x': s 1.0: not a whole number"),
    ],
)
def test_wrong_option(given: str, said: str) -> None:
    known = {"threads": int, "host": str}
    with pytest.raises(Unloadable) as caught:
        options.read("s 1.0", [given], known, {"host": "--bind"})
    assert str(caught.value) == said
