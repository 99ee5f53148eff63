"""Checks of what is installed."""

from __future__ import annotations

from collections.abc import Iterator

from steer.doctor.case import Case, Opinion, known
from steer.doctor.privileges import GET_LIBBPF
from steer.policy.builtin import EBPF

_GET_BCC = "for custom policies install bcc (Debian, Ubuntu: python3-bpfcc)"


def libbpf(case: Case) -> Iterator[Opinion]:
    found = case.facts.libbpf
    if isinstance(found, str):
        yield Opinion("ok", found)
    else:
        needed = EBPF in case.wanted
        yield Opinion("warn" if needed else "ok", found.reason, GET_LIBBPF if needed else "")


def bcc(case: Case) -> Iterator[Opinion]:
    found = known(case.facts.bcc, _GET_BCC)
    if found is None:
        yield Opinion(
            "ok", "not installed, and not needed: built-in policies are prebuilt", _GET_BCC
        )
    else:
        yield Opinion("ok", f"{found.version}, importable by {found.python}")
