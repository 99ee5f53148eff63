"""Converts values from outside, and says in plain words what is wrong with them. Pure.

There are two rules. For any input only `Invalid` is raised: int(), decoders and recursive parsers
raise various errors for odd values. And messages are written here: they have no words of a library,
and no value longer than a line.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_args

import msgspec
from msgspec import inspect

T = TypeVar("T")
_SHOWN_CHARS = 80
_DIGITS = r"[0-9]{1,20}"
"""More digits than any valid number has, and few enough for int()."""
_NUMBER = r"(?ai)[+-]?((\d++\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?)"
_REFUSALS = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)


class Invalid(ValueError):
    """A value that is not valid. Its text says why.

    Args:
        hint: what was probably meant, as a question; "" if nothing is similar.
    """

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.hint = hint


def whole_number(text: str, least: int, most: int) -> int:
    """Read a decimal number.

    int() alone would also accept "1_000", " 1" and the digits of every script.

    Raises:
        Invalid: `text` is anything but digits, or out of range.
    """
    value = int(text) if re.fullmatch(_DIGITS, text) else -1
    if not least <= value <= most:
        raise Invalid(f"not a whole number from {least} to {most}")
    return value


def convert(value: object, kind: Any, *, strict: bool) -> Any:
    """Convert a value to a type that msgspec knows.

    Args:
        strict: do not convert text, so that "3" is not a number.

    Raises:
        Invalid: it is no such value.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except _REFUSALS:
        raise _fault(value, kind, strict) from None


def decode(data: bytes | bytearray | memoryview, kind: type[T]) -> T:
    """Decode untrusted JSON.

    Raises:
        Invalid: it is no such message.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except _REFUSALS:
        raise Invalid(f"no such message: {plural(len(data), 'byte')}") from None


def check_text(text: str) -> None:
    """Raises Invalid: the text cannot be an argument, an environment variable or a path."""
    if "\0" in text:
        raise Invalid("a null byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Invalid("not UTF-8") from None


def shown(value: object) -> str:
    """A value as Python writes it, and a list as its items with commas; at most one line."""
    try:
        text = repr(",".join(map(str, value)) if isinstance(value, list | tuple) else value)
    except _REFUSALS:  # a number of more than 4,300 digits, or deeply nested lists
        return kind_of(value)
    if len(text) <= _SHOWN_CHARS:
        return text
    return f"{text[: _SHOWN_CHARS - 20]}... ({plural(len(text), 'character')})"


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """A question that names the most similar known word; "" if none is similar."""
    import difflib

    near = difflib.get_close_matches(str(given)[:_SHOWN_CHARS], list(known), n=1, cutoff=0.7)
    return f"did you mean {near[0]!r}?" if near else ""


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 worker", "3 workers"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def several(noun: str, things: Iterable[object]) -> str:
    """Things with their noun: "worker 1", "workers 1, 3"."""
    names = [str(each) for each in things]
    return f"{noun} {names[0]}" if len(names) == 1 else f"{noun}s {', '.join(names)}"


_KINDS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((bool,), "a boolean"),
    ((int,), "a whole number"),
    ((float,), "a number"),
    ((str,), "a string"),
    ((list, tuple), "a list"),
    ((dict,), "a table"),
    ((datetime.date, datetime.time), "a date or time"),
)
"""The words are those of TOML. bool comes before int, because it is a subclass of int."""


def kind_of(value: object) -> str:
    """The kind of a value, in words."""
    if value is None:
        return "no value"
    other = f"a {type(value).__name__} object"
    return next((name for types, name in _KINDS if isinstance(value, types)), other)


def _fault(value: object, kind: Any, strict: bool) -> Invalid:
    """What is wrong with a refused value.

    Raises:
        Invalid: what is wrong with the first invalid item of a list.
    """
    info = inspect.type_info(kind)
    if isinstance(info, inspect.VarTupleType) and isinstance(value, list | tuple):
        for item in value:
            convert(item, get_args(kind)[0], strict=strict)
    types = info.types if isinstance(info, inspect.UnionType) else (info,)
    alternatives = [each for each in types if type(each) in _FORMS]
    # In "N or auto" only N has bounds.
    form = _FORMS[type(alternatives[0])]
    if form.is_one(value, strict):
        return form.fault(value, alternatives[0])
    wanted = " or ".join(_FORMS[type(each)].wanted(each) for each in alternatives)
    given = "" if isinstance(value, str) and not strict else f"{kind_of(value)}, "
    return Invalid(f"{given}not {wanted}")


class _Form(msgspec.Struct, frozen=True):
    """How messages describe a type.

    Args:
        wanted: returns its name.
        is_one: whether a value is of that kind, although not of that type.
        fault: what is wrong with such a value.
    """

    wanted: Callable[[Any], str]
    is_one: Callable[[object, bool], bool] = lambda *_: False
    fault: Callable[[Any, Any], Invalid] = lambda *_: Invalid("malformed")


def _is_number(value: object, strict: bool) -> bool:
    if isinstance(value, str):
        return not strict and bool(re.fullmatch(_NUMBER, value.strip()))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object, strict: bool) -> bool:
    text = str(value) if isinstance(value, float) else value
    if isinstance(text, str):
        return not strict and bool(re.fullmatch(r"\s*[+-]?\d+\s*", text, re.ASCII))
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object, _strict: bool) -> bool:
    return isinstance(value, str)


def _out_of_range(value: Any, info: Any) -> Invalid:
    least = info.ge if info.ge is not None else info.gt
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if math.isnan(number):
        return Invalid("not a number")
    if (least is None or number >= least) and (info.le is None or number <= info.le):
        return Invalid("malformed: write it without sign, space or leading zero")
    return Invalid("too small" if least is not None and number <= least else "too large")


def _one_of(info: Any) -> str:
    """The only allowed word. If there are several, the message lists them elsewhere."""
    return info.values[0] if len(info.values) == 1 else "a string"


def _unknown(value: str, info: Any) -> Invalid:
    return Invalid("unknown", did_you_mean(value, info.values))


_FORMS: Mapping[type, _Form] = {
    inspect.IntType: _Form(lambda _: "a whole number", _is_whole, _out_of_range),
    inspect.FloatType: _Form(lambda _: "a number", _is_number, _out_of_range),
    inspect.BoolType: _Form(lambda _: "true or false"),
    inspect.StrType: _Form(lambda _: "a string", _is_text),
    inspect.LiteralType: _Form(_one_of, _is_text, _unknown),
    inspect.VarTupleType: _Form(lambda _: "a list"),
}
