"""The input and the output of the checks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar

import msgspec

from steer import features
from steer.config.plan import Plan
from steer.config.service import Service
from steer.doctor.facts import Facts, Unknown
from steer.errors import BindError, Note
from steer.features import Answer
from steer.loader import find
from steer.policy.builtin import BACKENDS, EBPF, KERNEL, Policy
from steer.workers.access import Access

_ALL_ACCESS = Access()
MOUNT_SYSFS = "mount sysfs on /sys"
ASK_AS_ROOT = "ask as root, in the machine's own network namespace, with /proc and /sys mounted"

T = TypeVar("T")
Verdict = Literal["ok", "warn", "fail", "unknown"]
RUN, MIGRATE, COUNT = "run", "migrate", "count"


class Finding(msgspec.Struct, frozen=True):
    """The finding of a check.

    Args:
        topic: a key of CHECKS. One topic may have several findings.
        verdict: "warn": the service would run with less than it could have. "fail": it
            would not start, or not as asked. "unknown": the check could not find out.
        cure: what would help; "" if nothing is wrong.
    """

    topic: str
    verdict: Verdict
    found: str
    cure: str


class Opinion(NamedTuple):
    """A finding without its topic."""

    verdict: Verdict
    found: str
    cure: str = ""


class Options(NamedTuple):
    """How the kernel responds to the service's socket options.

    Args:
        refused: an error for each option that the kernel refuses.
        shortfalls: a note for each option that the kernel accepts but limits.
    """

    refused: Sequence[BindError]
    shortfalls: Sequence[Note]


_NO_OPTIONS = Options((), ())


@dataclass(frozen=True)
class Case:
    """Everything that the checks judge.

    Args:
        probes: the result of each probe. Keys: the backends, RUN, MIGRATE and COUNT.
        plan: the plan that `run` would make without --strict, with the policy that `auto`
            becomes. Unknown if not even the CPUs could be read.
        access: what steer may inspect and borrow of its workers.
    """

    service: Service
    facts: Facts
    probes: Mapping[str, features.Finding]
    plan: Plan | Unknown
    options: Options = _NO_OPTIONS
    access: Access | Unknown = _ALL_ACCESS

    @property
    def policy(self) -> Policy:
        return self._last_candidate if isinstance(self.plan, Unknown) else self.plan.policy

    @cached_property
    def _last_candidate(self) -> Policy:
        """The last candidate for the policy: no other candidate runs on more backends."""
        asked = find.find(self.service.policy)
        return asked.candidates[-1] if asked.candidates else asked

    @property
    def wanted(self) -> Sequence[str]:
        """The backends that this service may use."""
        asked = self.service.backend
        first = 0 if asked == "auto" else BACKENDS.index(asked)
        return tuple(each for each in BACKENDS[first:] if each in self._last_candidate.backends)

    @property
    def is_steered(self) -> bool:
        return self.wanted != (KERNEL,)

    @property
    def has_tcp(self) -> bool:
        return any(bind.protocol == "tcp" for bind in self.service.binds)

    @property
    def has_cap_bpf(self) -> bool:
        """CAP_SYS_ADMIN includes CAP_BPF (capabilities(7)). Unreadable capabilities count as
        held."""
        held = self.facts.capabilities
        return isinstance(held, Unknown) or not held.isdisjoint({"CAP_BPF", "CAP_SYS_ADMIN"})

    @property
    def is_refused(self) -> bool:
        """Whether the kernel supports eBPF but refuses it with EPERM."""
        found = self.probes[EBPF]
        return found.answer is Answer.NO and not found.cure and found.errno == errno.EPERM


class CouldNotTell(Exception):
    def __init__(self, reason: str, cure: str) -> None:
        self.opinion = Opinion("unknown", reason, cure)


Check = Callable[[Case], Iterable[Opinion]]


def known(value: T | Unknown, cure: str = ASK_AS_ROOT) -> T:
    if isinstance(value, Unknown):
        raise CouldNotTell(value.reason, cure)
    return value


def sysctl(case: Case, name: str) -> int:
    value = case.facts.sysctls[name]
    if isinstance(value, Unknown):
        raise CouldNotTell(f"{name}: {value.reason}", ASK_AS_ROOT)
    return value
