"""Asks the system, and tries in the small what `steer run` would do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing

import msgspec

from steer.backends.connections import Counting
from steer.backends.open import open_whole
from steer.config import auto, candidates
from steer.config import plan as planning
from steer.config.candidates import Answer
from steer.config.plan import Plan
from steer.config.service import Service
from steer.doctor import facts as kernel_facts
from steer.doctor.case import COUNT, ERRNO_REFUSED, MIGRATE, RUN, Case, Options, Probed
from steer.doctor.facts import Unknown
from steer.errors import KernelError, SteerError, Uncounted, VerifierError, in_words
from steer.linux import topology
from steer.loader import find, probe
from steer.policy.builtin import CBPF, EBPF
from steer.sockets import sockopt
from steer.workers import visibility
from steer.workers.access import Access

REPORT = "report it with the verifier's words, which `steer run` shows"


def look(service: Service) -> Case:
    """Ask the system, and try in the small what `run` would do."""
    asked = {
        RUN: probe.run,
        EBPF: probe.ebpf,
        CBPF: probe.cbpf,
        MIGRATE: probe.migrate,
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
        return Unknown(f"try with a process: {in_words(error)}")


def _can_count() -> candidates.Finding:
    """Whether the kernel counts open connections for us."""
    try:
        with closing(Counting(1)) as counting:
            answer = Answer.NO if counting.why_not else Answer.YES
            return candidates.Finding(answer, counting.why_not)
    except KernelError as error:
        return candidates.Finding(Answer.NO, str(error))


def _probed(ask: Callable[[], candidates.Finding]) -> Probed:
    try:
        found = ask()
    except OSError as error:
        return Probed(Answer.UNKNOWN, in_words(error))
    reason, _, cure = found.reason.partition("; ")
    # Of the many causes that a refusal can have, we look for the one.
    return Probed(found.answer, reason, "" if ERRNO_REFUSED in reason else cure)


def _try_out(service: Service, probes: dict[str, Probed]) -> Plan | Unknown:
    """The plan whose first rung takes the policy itself; what does not is noted in `probes`."""
    plan = _plan(service, probes)
    while not isinstance(plan, Unknown):
        backend = plan.rungs[0].backend
        refusal = _refusal(plan)
        if refusal is None:
            break
        if plan.others:
            following, *rest = plan.others
            plan = plan.choosing_by([auto.because(following, refusal.reason), *rest])
        else:
            probes[backend] = refusal
            plan = _plan(service, probes)
    return plan


def _plan(service: Service, probes: Mapping[str, Probed]) -> Plan | Unknown:
    lenient = msgspec.structs.replace(service, strict=False)
    try:
        return planning.plan(lenient, topology.read(), probes, find.find(service.policy))
    except SteerError as error:
        return Unknown(f"{error.what}: {error.cause}")
    except (OSError, ValueError) as error:
        return Unknown(f"read the CPUs: {error}")


def _refusal(plan: Plan) -> Probed | None:
    whose = f"{plan.policy.name}: " if plan.others else ""
    try:
        open_whole(plan).close()
    except Uncounted as error:
        return Probed(Answer.NO, str(error))
    except VerifierError as error:
        return Probed(Answer.NO, f"{whose}{error.what}: {error.cause}", error.cure or REPORT)
    except KernelError as error:
        cure = "" if error.cause == ERRNO_REFUSED else error.cure
        return Probed(Answer.NO, f"{whose}{error.what}: {error.cause}", cure)
    except OSError as error:
        # A no though it tells little: what is unknown would be tried again, for ever.
        return Probed(Answer.NO, f"{whose}try {plan.rungs[0].backend}: {in_words(error)}")
    return None
