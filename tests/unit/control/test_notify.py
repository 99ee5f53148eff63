"""Messages of readiness."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress

import pytest

from steer.child import launch
from steer.config.servers import says_ready_early
from steer.control import notification_buffer
from steer.control.notify import parse
from steer.values import Invalid


@pytest.mark.parametrize(
    "message, found",
    [
        (b"READY=1", {"READY": "1"}),
        (b"READY=1\nSTATUS=a=b\n\n", {"READY": "1", "STATUS": "a=b"}),
        (b"READY=0\nREADY=1\n", {"READY": "1"}),
        (b"READY\n=\n", {"": ""}),
        (b"", {}),
        (b"\xff\x00=\xfe", {"\ufffd\0": "\ufffd"}),
    ],
)
def test_assignments_of_a_message(message: bytes, found: Mapping[str, str]) -> None:
    assert parse(message) == found


@pytest.mark.parametrize(
    "arguments, early",
    [
        (["gunicorn", "-w", "1", "app:app"], True),
        (["/usr/bin/python3", "/usr/bin/gunicorn", "app:app"], True),
        (["python3", "-m", "gunicorn", "app:app"], True),
        (["gunicorn: master [app:app]"], True),
        (["python3", "serve.py", "--name", "gunicorn"], False),
        (["uvicorn", "app:app"], False),
        ([], False),
    ],
)
def test_who_says_ready_early(arguments: list[str], early: bool) -> None:
    assert says_ready_early(arguments) is early


def test_of_a_worker_that_is_known_nobody_further_is_looked_for() -> None:
    parent = os.getppid()
    assert notification_buffer.lineage(os.getpid(), {os.getpid(), parent}) == (os.getpid(),)
    assert notification_buffer.lineage(os.getpid(), {parent}) == (os.getpid(), parent)
    assert parent in notification_buffer.lineage(os.getpid())


def _anything(seed: int) -> Iterator[bytes]:
    """Messages with something wrong in them, and bytes that are none."""
    chance = random.Random(seed)
    values = (
        "0", "-1", "1", "2.5", "null", "true", '"x"', "[]", "[1]", "[1,2,3]", "{}", "9" * 5000,
        "1e999", "-0", '"\\u0000"', '"\\ud800"', "[" * 3000,
    )  # fmt: skip
    fields = ("unloadable", "detail", "other")
    while True:
        chosen = chance.sample(fields, chance.randrange(3))
        pairs = ",".join(f'"{field}":{chance.choice(values)}' for field in chosen)
        data = bytearray(f"{{{pairs}}}".encode())
        if chance.random() < 0.3 and data:
            data[chance.randrange(len(data))] = chance.randrange(256)
        yield bytes(data)


def test_message_is_understood_or_invalid_and_nothing_else() -> None:
    messages = _anything(28)
    for _ in range(20_000):
        data = next(messages)
        with suppress(Invalid):
            assert launch.read(data).unloadable
