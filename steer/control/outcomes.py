"""What a service did when asked, in the words of its answer."""

from __future__ import annotations

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
    """Also what is drained no longer."""

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
"""What was done, in the words of the answer; as text, what to tell of it."""

_KINDS: tuple[type[Outcome], ...] = (Reloaded, Scaled, Drained, Restarted, Swapped)
_BY_NAME = {kind.__name__: kind for kind in _KINDS}


def outcome_of(command: str) -> type[Outcome]:
    """The class of a command's outcome. Raises KeyError: it has none."""
    return _BY_NAME[COMMANDS[command].outcome]


def _workers(count: int) -> str:
    return plural(count, "worker")
