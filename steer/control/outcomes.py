"""The outcomes of requests: what a service did, as the fields of its answer and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import msgspec

from steer.control.commands import COMMANDS
from steer.values import plural


class Reloaded(msgspec.Struct):
    generation: int
    workers: int
    took_s: float

    def __str__(self) -> str:
        return f"generation {self.generation}, {_workers(self.workers)}, {self.took_s:.1f} s"


class Scaled(msgspec.Struct):
    workers: int
    took_s: float

    def __str__(self) -> str:
        return f"{_workers(self.workers)}, {self.took_s:.1f} s"


class Drained(msgspec.Struct):
    """The outcome of `drain`, and of `undrain`."""

    slot: int

    def __str__(self) -> str:
        return f"slot {self.slot}"


class Restarted(msgspec.Struct):
    slot: int
    new_slot: int
    took_s: float

    def __str__(self) -> str:
        return f"slot {self.new_slot} in place of slot {self.slot}, {self.took_s:.1f} s"


class Swapped(msgspec.Struct):
    policy: str
    backend: str
    took_s: float

    def __str__(self) -> str:
        return f"{self.policy} on {self.backend}, {1000 * self.took_s:.1f} ms"


Outcome = Reloaded | Scaled | Drained | Restarted | Swapped
"""Its fields are those of the answer. As a string, it is what the command line prints."""

_BY_NAME: Mapping[str, type[Outcome]] = {kind.__name__: kind for kind in get_args(Outcome)}


def outcome_of(command: str) -> type[Outcome]:
    """The class of a command's outcome. Raises KeyError: the command has no outcome."""
    return _BY_NAME[COMMANDS[command].outcome]


def _workers(count: int) -> str:
    return plural(count, "worker")
