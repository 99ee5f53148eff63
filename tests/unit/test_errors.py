"""An error says what was tried and why not, and keeps the kernel's number to decide by."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import steer
from steer import errors
from steer.errors import (
    BindError,
    CompileError,
    ConfigError,
    KernelError,
    Refused,
    SteerError,
    VerifierError,
)

CURES = {errno.EPERM: "run as root"}


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (KernelError, "EPERM"),
        (BindError, "EPERM"),
        (ConfigError, "Operation not permitted"),
        (CompileError, "Operation not permitted"),
    ],
)
def test_a_system_call_that_failed(kind: type[SteerError], shown: str) -> None:
    error = kind.from_oserror("attach", refusal(errno.EPERM), CURES)
    assert type(error) is kind
    assert (error.cause, error.cure, error.errno) == (shown, "run as root", errno.EPERM)
    assert str(error) == f"attach: {shown}; run as root"


def test_the_cure_is_of_the_errno() -> None:
    error = KernelError.from_oserror("attach", refusal(errno.ENOMEM), CURES)
    assert (error.cure, error.errno) == ("", errno.ENOMEM)
    error = KernelError.from_oserror("attach", refusal(errno.ENOMEM), CURES, cure="ask again")
    assert error.cure == "ask again"


def test_another_cause_may_be_shown() -> None:
    error = KernelError.from_oserror("start", refusal(errno.EAGAIN), cause="try later")
    assert (error.cause, error.errno) == ("try later", errno.EAGAIN)


def test_a_number_without_a_name_is_shown_as_it_is() -> None:
    error = KernelError.from_oserror("attach", OSError(524, "Unknown error 524"))
    assert (error.cause, error.errno) == ("524", 524)


def test_an_error_without_a_number_says_what_it_is() -> None:
    error = KernelError.from_oserror("ask", TimeoutError("timed out"))
    assert (error.cause, error.errno) == ("timed out", None)


ERRORS = [
    *(
        kind("act", "cause")
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, SteerError)
    ),
    KernelError("act", "EPERM", "run as root", "a line", errno.EPERM),
    Refused("act", "the answer", "a line", 4),
    VerifierError("act", "refused", log="a log"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_another_process_gets_the_same_error(
    error: SteerError, again: Callable[[SteerError], SteerError]
) -> None:
    """As concurrent.futures and multiprocessing send it."""
    error.add_note("in slot 3")
    found = again(error)
    assert type(found) is type(error)
    assert (vars(found), found.args, str(found)) == (vars(error), error.args, str(error))


def test_the_cause_why_a_larger_act_failed_keeps_all_it_knows() -> None:
    inner = VerifierError("load", "EACCES", "see below", "line 3", errno.EACCES, log="whole")
    outer = inner.under("reload web", "nothing has changed")
    assert type(outer) is VerifierError
    assert str(outer) == "reload web: load: EACCES; see below; nothing has changed"
    assert outer.args == (str(outer),)
    assert (outer.what, outer.errno) == ("reload web", errno.EACCES)
    assert (outer.detail, outer.log) == ("line 3", "whole")
    assert str(inner) == "load: EACCES; see below"


def test_a_refused_request_is_shown_under_another_act() -> None:
    refused = Refused("ask web", "scale web to 0: too few", exit_code=2)
    assert refused.under("scale").exit_code == 2


def test_an_error_of_another_type_keeps_the_fields() -> None:
    error = KernelError.like(BindError("bind :80", "EACCES", "run as root", "x", errno.EACCES))
    assert type(error) is KernelError
    assert (str(error), error.detail) == ("bind :80: EACCES; run as root", "x")
    assert error.errno == errno.EACCES


_ERROR = r"(error|exception|failure|problem|refusal|why|why_not)"
_FIELD = rf"(\.(reason|what|cause|cure|detail)|\bstr\((\w+\.)*{_ERROR}\)|\borigins?(\[.*?\])?)"
SEARCHED = (
    rf"{_FIELD} (==|!=|in|not in) ",
    rf"(==|!=|\bin|\bnot in) {_FIELD}(?!\w)",
    rf"{_FIELD}\.(r?partition|r?split|(starts|ends)with|remove(pre|suf)fix|r?find|r?index|replace)\(",
    rf"\btype\({_ERROR}\)\(",
    rf"\b\w+Error\(.*\b{_ERROR}\.(what|cause)\b",
    r'"E[A-Z0-9]{3,}" (==|!=|in|not in) ',
    r' (==|!=|in|not in) "E[A-Z0-9]{3,}"',
    r'(partition|split)\("; "\)',
)


def test_nothing_searches_the_text_of_an_error() -> None:
    """Whoever has to decide by an error has its type and its errno."""
    found = [
        f"{file.name}: {line.strip()}"
        for file in Path(steer.__file__).parent.rglob("*.py")
        for line in file.read_text().splitlines()
        if any(re.search(pattern, line) for pattern in SEARCHED)
    ]
    assert found == []
