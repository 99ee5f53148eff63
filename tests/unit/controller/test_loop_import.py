"""What is done once the first worker is ready."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterable
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import pytest

from steer.controller.loop_import import await_loop

SAID = [((2,), {"STATUS": "soon"}), ((3,), {"READY": "1"}), ((2,), {"READY": "1"})]


class Starting:
    """A service that imports its loop; that is over once nothing is done meanwhile.

    Attributes:
        early: what was heard.
        serves: whether its worker does.
        imported: the same when the import was over.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *command: str) -> None:
        self.early: list[object] = []
        self.serves = False
        self.imported: list[bool] = []
        self._command = command
        self._said = iter(SAID)
        patch.setattr(importlib, "import_module", lambda _: self.imported.append(self.serves))
        patch.setattr(threading, "Thread", self._thread)

    @staticmethod
    def _thread(target: Callable[[], None], daemon: bool) -> object:
        return SimpleNamespace(start=lambda: None, is_alive=lambda: True, join=target)

    def serve_early(self, pid: int) -> bool:
        """One of two is of no worker."""
        self.serves |= pid == 2
        return pid == 2

    def fileno(self) -> int:
        return self._always_readable

    def receive(self) -> Iterable[object]:
        return islice(self._said, 1)

    def run(self) -> None:
        with open(os.devnull) as file:
            self._always_readable = file.fileno()
            here = cast(Any, self)
            self.early += await_loop(here, here, runs_command=bool(self._command))


def test_first_that_is_ready_serves_whatever_was_said_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the loop is still imported."""
    starting = Starting(monkeypatch)
    starting.run()
    assert starting.imported == [True]
    assert starting.early == SAID


def test_what_is_said_for_commands_is_left_until_there_is_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starting = Starting(monkeypatch, "server")
    starting.run()
    assert starting.imported == [False]
    assert starting.early == []
