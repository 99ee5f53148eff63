"""Checks the types and ranges of arguments, and names the argument in the error. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from msgspec import Meta

from steer import values
from steer.errors import ConfigError
from steer.values import Invalid, shown

_NO_PARAMS = "a mapping of names to whole numbers"


def whole_number(
    name: str, value: object, act: str, *, least: int = 0, most: int = 2**63 - 1, allowed: str = ""
) -> int:
    """The value, if it is a whole number in the range.

    Args:
        name: the name of the argument.
        act: the act that errors name.
        allowed: what errors say is allowed; "": the range.

    Raises:
        ConfigError: it is not.
    """
    try:
        number: int = values.convert(value, Annotated[int, Meta(ge=least, le=most)], strict=True)
    except Invalid as error:
        raise _wrong(name, value, act, str(error), allowed or f"{least} to {most}") from None
    return number


def string(name: str, value: object, act: str, allowed: str) -> str:
    """The value, if it is a string. Raises ConfigError."""
    if not isinstance(value, str):
        raise _wrong(name, value, act, f"{values.kind_of(value)}, not a string", allowed)
    return value


def parameters(value: Mapping[str, int] | None, act: str) -> list[str]:
    """The parameters of a policy, in the form of `Service.params`.

    Raises:
        ConfigError: they are no mapping of strings to whole numbers.
    """
    given = {} if value is None else value
    if not isinstance(given, Mapping) or not all(isinstance(each, str) for each in given):
        raise _wrong("params", value, act, f"not {_NO_PARAMS}", "{'prefix4': 24}")
    most = 2**32 - 1
    return [
        f"{key}={whole_number(f'params[{key!r}]', each, act, least=0, most=most)}"
        for key, each in given.items()
    ]


def weights(value: Sequence[int], act: str, most: int) -> list[str]:
    """The weights of workers, in the form of a request. Raises ConfigError."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong("weights", value, act, "not a sequence of whole numbers", "[3, 1]")
    return [
        str(whole_number(f"weights[{number}]", each, act, least=1, most=most))
        for number, each in enumerate(value)
    ]


def _wrong(name: str, value: object, act: str, why: str, allowed: str) -> ConfigError:
    return ConfigError(f"{act}: {name} = {shown(value)}", why, f"allowed: {allowed}")
