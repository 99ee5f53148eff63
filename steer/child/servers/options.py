"""Reads options of a server as the installed version declares them. Pure."""

from __future__ import annotations

import os
import types
from collections.abc import Container, Iterable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from steer import values
from steer.child.launch import Unloadable
from steer.values import Invalid

_PLAIN = (bool, int, float, str, list, dict, type(None))
ANY = Any
"""The type of an option whose type is not known: JSON, or else a string."""


def read(
    server: str, given: Iterable[str], known: Mapping[str, Any], ours: Mapping[str, str]
) -> dict[str, Any]:
    """The values of options, by name.

    Args:
        server: the name and version of the server, for errors.
        given: NAME=VALUE; a value that is no string is written as in JSON.
        known: the types of the options that the server has, by name.
        ours: options that steer sets itself, with what to use in place of each.

    Raises:
        Unloadable: the server has no such option, steer sets it, or the value has another type.
    """
    found = {}
    for each in given:
        name, _, text = each.partition("=")
        if name in ours:
            raise Unloadable(f"server option {name}: steer sets it; use {ours[name]}")
        if name not in known:
            hint = values.did_you_mean(name, [each for each in known if each not in ours])
            why = f"server option {name}: {server} has no such option"
            raise Unloadable(f"{why}; {hint}" if hint else why)
        try:
            found[name] = value_of(text, known[name])
        except Invalid as error:
            shown = values.shown(text)
            raise Unloadable(f"server option {name} = {shown}: {server}: {error}") from None
    return found


def refuse_half_tls(given: Mapping[str, Any], tls: Container[str], needed: Iterable[str]) -> None:
    """See that options of TLS are complete: with some of them missing, servers serve plain text.

    Args:
        tls: the options of TLS.
        needed: those without which the server uses no TLS.

    Raises:
        Unloadable: some are given, and not all that are needed.
    """
    named = next((name for name in given if name in tls), None)
    missing = [name for name in needed if not given.get(name)]
    if named is not None and missing:
        why = f"server option {named}: without {' and '.join(missing)} there would be no TLS"
        raise Unloadable(f"{why}; give {'both' if len(missing) > 1 else 'it'}, too")


def value_of(text: str, declared: Any) -> Any:
    """A value from its text.

    Args:
        declared: the type that the server declares.

    Raises:
        Invalid: it is not of that type, or nothing that can be written is.
    """
    named = next((each for each in _parts(declared) if _is_enum(each)), None)
    if named is not None:
        name: str = values.convert(text, Literal[*named.__members__], strict=True)
        return named[name]
    plain = _plain(declared)
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = text
    if plain is ANY:
        return value
    try:
        return msgspec.convert(value, plain)
    except msgspec.ValidationError:
        return values.convert(text, plain, strict=False)


def _plain(declared: Any) -> Any:
    """The part of a type that can be written down: of `int | Path | Callable`, `int | str`.

    Raises:
        Invalid: there is none.
    """
    if declared is ANY:
        return ANY
    parts = set(_parts(declared))
    if not parts - {type(None)}:
        raise Invalid("it takes an object of Python, which cannot be written here")
    return Union[tuple(parts)]  # noqa: UP007 (made at run time)


def _parts(declared: Any) -> Iterable[Any]:
    if get_origin(declared) in (Union, types.UnionType):
        for each in get_args(declared):
            yield from _parts(each)
    elif declared in _PLAIN or get_origin(declared) in (list, dict, Literal) or _is_enum(declared):
        yield declared
    elif (get_origin(declared) or declared) is os.PathLike:
        yield str


def _is_enum(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, Enum)
