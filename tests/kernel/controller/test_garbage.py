"""No look for garbage is for what stays, and nothing that was set aside piles up."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from steer.workers.clock import Clock, Timer
from steer.workers.process import WorkerProcess

PRELUDE = """
import gc
from steer.controller.garbage import Garbage

gc.disable()
there = []
garbage = Garbage(lambda: len(there))

def cycles(number):
    for _ in range(number):
        one, other = [], []
        one.append(other)
        other.append(one)
"""


def told(script: str) -> str:
    """What a process of its own tells: it is to know of all its objects."""
    code = PRELUDE + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_there_while_nothing_is_under_way_is_not_looked_at() -> None:
    script = """
        there += ([number] for number in range(50_000))
        before = len(gc.get_objects())
        garbage.set_aside()
        print(before > 50_000, len(gc.get_objects()) < 1_000, len(there))
    """
    assert told(script) == "True True 50000"


def test_what_is_set_aside_is_freed_when_nobody_refers_to_it() -> None:
    script = """
        there += ([number] for number in range(50_000))
        garbage.set_aside()
        before = gc.get_freeze_count()
        there.clear()
        print(before - gc.get_freeze_count() >= 50_000)
    """
    assert told(script) == "True"


def test_what_is_garbage_already_is_not_set_aside() -> None:
    script = """
        garbage.set_aside()
        before = gc.get_freeze_count()
        gc.disable()
        gc.collect(0)  # as it comes about by itself
        cycles(2_000)
        garbage.set_aside()
        print(gc.get_freeze_count() - before < 500)
    """
    assert told(script) == "True"


def test_what_becomes_garbage_once_it_is_set_aside_does_not_pile_up() -> None:
    script = """
        first = most = gc.get_freeze_count()
        for _ in range(100):
            one, other = [[[]] for _ in range(2_000)], []
            one.append(other)
            other.append(one)
            garbage.set_aside()
            one = other = None
            most = max(most, gc.get_freeze_count())
        print(most < 2 * (first + 5_000), 100 * 2_000 > 2 * (first + 5_000))
    """
    assert told(script) == "True True"


def test_many_workers_are_no_reason_to_look_at_all() -> None:
    script = """
        there += ([[] for _ in range(90)] for _ in range(1_000))
        looks = []
        gc.callbacks.append(lambda phase, info: looks.append(info["generation"]))
        garbage.set_aside()
        print(max(looks))
    """
    assert told(script) == "1"


def test_what_is_set_aside_is_seldom_counted() -> None:
    """With a thousand workers that takes 10 ms."""
    script = """
        there += ([] for _ in range(1_000))
        count, counts = gc.get_freeze_count, []
        gc.get_freeze_count = lambda: counts.append(1) or count()
        for _ in range(50):
            kept = [[] for _ in range(2_000)]
            garbage.set_aside()
        print(len(counts))
    """
    assert told(script) == "0"


@pytest.fixture
def without_looks() -> Iterator[None]:
    """Only what nobody refers to is freed."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_looks")
def test_of_a_worker_that_has_ended_nothing_is_left() -> None:
    launch: Any = SimpleNamespace(service=SimpleNamespace(log_format="text"), slot=0)
    guard: Any = SimpleNamespace(drop=lambda _key: None)
    ends: list[WorkerProcess] = []

    async def run() -> weakref.ref[WorkerProcess]:
        worker = WorkerProcess(launch, guard)
        with ExitStack() as theirs, ExitStack() as ours:
            worker.prepare([], theirs, ours)
            ours.pop_all()
        pid = os.posix_spawn("/bin/true", ["true"], {})
        worker.forked(pid, os.pidfd_open(pid))
        ended = asyncio.Event()

        def end(whose: WorkerProcess) -> None:
            ends.append(whose)
            ended.set()

        worker.watch(asyncio.get_running_loop(), partial(end, worker))
        await ended.wait()
        ends.clear()
        worker.let_go()
        return weakref.ref(worker)

    assert asyncio.run(run())() is None


@pytest.mark.usefixtures("without_looks")
def test_of_a_timer_that_is_over_nothing_is_left() -> None:

    async def run() -> weakref.ref[Timer]:
        loop, rung = asyncio.get_running_loop(), asyncio.Event()
        clock = Clock(loop.time)
        clock.run(loop)
        timer = weakref.ref(clock.call_later(0.0, rung.set))
        assert timer() is not None
        await rung.wait()
        return timer

    assert asyncio.run(run())() is None
