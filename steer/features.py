"""The kernel features that steer uses, since which Linux each exists, and what a probe can answer.
Pure.

`loader.probe` has a probe for each. The versions are only shown to users. Whether a feature exists
is found out by trying it, as distributions backport some and containers refuse others.
"""

from __future__ import annotations

import re
from enum import Enum

import msgspec

from steer.errors import Note


class Feature(msgspec.Struct, frozen=True):
    """A feature that not every kernel has.

    Args:
        name: its name in the man pages.
        since: the first Linux that has it.
        gives: what steer needs it for.
    """

    name: str
    since: tuple[int, int]
    gives: str

    @property
    def version(self) -> str:
        """The first version as text, "5.14"."""
        return f"{self.since[0]}.{self.since[1]}"

    @property
    def cure(self) -> str:
        """What to do if the kernel does not have it."""
        return f"use Linux {self.version} or later"

    def is_newer_than(self, release: str) -> bool:
        """Whether this release, as in uname(2), is older than the feature."""
        return kernel_version(release) < self.since


# Reuseport programs for TCP are from 4.6, those for UDP from 4.5; pidfd_open(2) is from 5.3.
CBPF = Feature("SO_ATTACH_REUSEPORT_CBPF", (4, 6), "to steer by classic BPF")
RUN = Feature("waitid(P_PIDFD)", (5, 4), "to run at all and to steer by classic BPF")
EBPF = Feature("BPF_F_MMAPABLE", (5, 5), "to steer by eBPF")
BORROW = Feature("pidfd_getfd", (5, 6), "to move the queue of a worker that hangs")
COUNT = Feature("BPF_LINK_CREATE", (5, 7), "to count open connections")
MIGRATE = Feature(
    "BPF_SK_REUSEPORT_SELECT_OR_MIGRATE", (5, 14), "to move the queue of a worker that ends"
)
FEATURES = (CBPF, RUN, EBPF, BORROW, COUNT, MIGRATE)


def kernel_version(release: str) -> tuple[int, int]:
    """The version in a release of uname(2): "6.1.0-56-amd64" is (6, 1)."""
    match = re.match(r"(\d{1,5})\.(\d{1,5})", release, re.ASCII)
    return (int(match[1]), int(match[2])) if match else (0, 0)


class Answer(Enum):
    """What a probe can answer."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "could not tell"


class Finding(msgspec.Struct, frozen=True):
    """What a probe found.

    Args:
        reason: why; "" for a plain yes.
        cure: what would help, or "".
        errno: the errno of the reason; code decides by it.
    """

    answer: Answer
    reason: str = ""
    cure: str = ""
    errno: int | None = None

    @classmethod
    def of(cls, answer: Answer, why: Note) -> Finding:
        """An answer with its reason and cure."""
        return cls(answer, *why)

    @property
    def note(self) -> Note:
        """The reason and the cure."""
        return Note(self.reason, self.cure, self.errno)
