"""What fails is tried again, and said once."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from steer.errors import KernelError
from steer.linux import retry
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare


class Failing:
    """Fails so many times, each time with the next of the errors, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return "done"


class Lines(Log):
    """A log that is kept."""

    def __init__(self) -> None:
        super().__init__("info", "text")
        self.lines: list[str] = []

    def error(self, text: str, *values: object) -> None:
        self.lines.append(text % values)


@pytest.fixture
def log() -> Lines:
    return Lines()


@pytest.fixture
def tries(log: Lines) -> Retry:
    return Retry(log, Spare(2))


def no_room() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_same_failure_is_said_once_until_it_succeeds(tries: Retry, log: Lines) -> None:
    act = Failing(no_room(), no_room(), MemoryError())
    assert [tries.attempt("look", act) for _ in range(4)] == [False, False, False, True]
    assert log.lines == [
        "look: Too many open files; it is tried again",
        "look: out of memory; it is tried again",
    ]
    assert not tries.attempt("look", Failing(no_room()))
    assert len(log.lines) == 3


@pytest.mark.parametrize(
    "error, said",
    [
        (KernelError("attach", "ENOMEM"), "look: attach: ENOMEM; "),
        (ZeroDivisionError("by nothing"), "bug in steer: look: ZeroDivisionError('by nothing'); "),
        (OSError("odd"), "look: odd; "),
    ],
)
def test_what_the_machine_lacks_is_told_from_a_bug(
    tries: Retry, log: Lines, error: Exception, said: str
) -> None:
    assert tries.result("look", Failing(error), "otherwise") == "otherwise"
    assert log.lines == [f"{said}it is tried again"]


def test_is_tried_again_until_it_is_done_or_not_wanted(
    tries: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "AGAIN_S", 0.001)
    some, endless = Failing(*[no_room()] * 3), Failing(*[no_room()] * 1000)

    async def until_then() -> None:
        tries.watch(asyncio.get_running_loop())
        tries.until_done("first", some)
        tries.until_done("second", endless, wanted=lambda: endless.calls < 5)
        while some.calls < 4 or endless.calls < 5:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)

    asyncio.run(until_then())
    assert (some.calls, endless.calls) == (4, 5)
