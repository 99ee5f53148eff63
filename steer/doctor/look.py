"""Reads the facts of this system, and tries on a small scale what `steer run` would do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial

import msgspec

from steer import features
from steer.backends.connections import Counting
from steer.backends.open import open_first
from steer.config import adopting, candidates
from steer.config.plan import Plan
from steer.config.service import Service
from steer.doctor import facts as kernel_facts
from steer.doctor.case import COUNT, MIGRATE, RUN, Case, Options
from steer.doctor.facts import Unknown
from steer.errors import (
    CompileError,
    KernelError,
    SteerError,
    Uncounted,
    VerifierError,
    in_words,
)
from steer.features import Answer, Finding
from steer.linux import topology
from steer.loader import find, probe
from steer.policy.builtin import CBPF, EBPF
from steer.sockets import sockopt
from steer.workers import visibility
from steer.workers.access import Access

REPORT = "report it with the verifier's log, which `steer run` shows"


def look(service: Service) -> Case:
    """Read the facts, and try on a small scale what `run` would do."""
    asked: dict[str, Callable[[], Finding]] = {
        RUN: partial(probe.ask, features.RUN),
        EBPF: partial(probe.ask, features.EBPF),
        CBPF: partial(probe.ask, features.CBPF),
        MIGRATE: partial(probe.ask, features.MIGRATE),
        COUNT: _can_count,
    }
    probes = {name: _probed(ask) for name, ask in asked.items()}
    plan = _try_out(service, probes)
    found = kernel_facts.read(os.environ, service.control_socket)
    options = Options(
        tuple(sockopt.refused(service.binds, service.settings)),
        tuple(sockopt.shortfalls(service.binds, service.settings)),
    )
    return Case(service, found, probes, plan, options, _access(service))


def _access(service: Service) -> Access | Unknown:
    try:
        return visibility.of(service)
    except SteerError as error:
        return Unknown(str(error))
    except OSError as error:
        return Unknown(f"try to inspect a process: {in_words(error)}")


def _can_count() -> Finding:
    """Whether programs that count open connections can be loaded and attached here."""
    links = probe.ask(features.COUNT)
    if links.errno == errno.EINVAL:
        return links
    try:
        with closing(Counting(1)) as counting:
            why_not = counting.why_not
            return Finding.of(Answer.NO, why_not) if why_not else Finding(Answer.YES)
    except KernelError as error:
        return Finding.of(Answer.NO, error.note)


def _probed(ask: Callable[[], Finding]) -> Finding:
    try:
        return _without_eperm_cure(ask())
    except OSError as error:
        return Finding(Answer.UNKNOWN, in_words(error))


def _without_eperm_cure(found: Finding) -> Finding:
    """The finding. For EPERM without its cure, as the checks find out what refuses."""
    return msgspec.structs.replace(found, cure="") if found.errno == errno.EPERM else found


def _try_out(service: Service, probes: dict[str, Finding]) -> Plan | Unknown:
    """The plan with the first backend that can load the policy. A backend that cannot gets its
    error into `probes`."""
    plan = _plan(service, probes)
    while not isinstance(plan, Unknown):
        backend = plan.backends[0].backend
        refusal = _refusal(plan)
        if refusal is None:
            break
        if plan.others:
            following, *rest = plan.others
            plan = plan.with_candidates([candidates.with_reason(following, refusal.reason), *rest])
        else:
            probes[backend] = refusal
            plan = _plan(service, probes)
    return plan


def _plan(service: Service, probes: Mapping[str, Finding]) -> Plan | Unknown:
    lenient = msgspec.structs.replace(service, strict=False)
    # The checks say what would help.
    found = {name: Finding(each.answer, each.reason) for name, each in probes.items()}
    try:
        return adopting.shown(lenient, topology.read(), found, find.find(service.policy))
    except SteerError as error:
        return Unknown(error.note.found)
    except (OSError, ValueError) as error:
        return Unknown(f"read the CPUs: {error}")


def _refusal(plan: Plan) -> Finding | None:
    whose = f"{plan.policy.name}: " if plan.others else ""
    try:
        open_first(plan).close()
    except Uncounted as error:
        return Finding(Answer.NO, str(error))
    except VerifierError as error:
        return Finding(Answer.NO, f"{whose}{error.note.found}", error.cure or REPORT)
    except CompileError as error:
        return Finding(Answer.NO, f"{whose}{error.note.found}", error.cure)
    except KernelError as error:
        found = f"{whose}{error.note.found}"
        return _without_eperm_cure(Finding(Answer.NO, found, error.cure, error.errno))
    except OSError as error:
        # Answer.UNKNOWN would be tried again, without end.
        return Finding(Answer.NO, f"{whose}try {plan.backends[0].backend}: {in_words(error)}")
    return None
