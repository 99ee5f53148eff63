"""An error says what was tried and why not, and keeps the kernel's number to decide by."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

import steer
from steer.errors import BindError, CompileError, ConfigError, KernelError, SteerError

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


SEARCHED = (
    r"\.cause (==|!=|in|not in) ",
    r'"E[A-Z0-9]{3,}" (==|!=|in|not in) ',
    r' (==|!=|in|not in) "E[A-Z0-9]{3,}"',
    r'partition\("; "\)',
    r'split\("; "\)',
    r"\.(reason|cause)\.(r?partition|split|startswith|removeprefix)\(",
    r" in [a-z_.]*\.(reason|cause)\b",
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
