"""Checks of backends: which backend the service gets, why it gets no better one, and what would
help."""

from __future__ import annotations

from collections.abc import Iterator

from steer import features
from steer.backends import anchors
from steer.backends.shortfalls import DATAGRAMS_LOST, NO_EXCLUSION, NO_SPARES
from steer.doctor.case import COUNT, MIGRATE, MOUNT_SYSFS, RUN, Case, Opinion, known
from steer.doctor.privileges import ebpf_cure
from steer.features import Answer, Finding
from steer.loader import probe
from steer.policy.builtin import CBPF, EBPF, KERNEL

_STEERABLE = f"choose a policy that runs on {EBPF} or {CBPF}, which can leave workers out"

_COUNT_CURE = "give CAP_BPF and CAP_NET_ADMIN, and mount cgroup2 where it can be read"
GET_CBPF = features.RUN.cure


def kernel(case: Case) -> Iterator[Opinion]:
    here, found = f"Linux {case.facts.release} on {case.facts.machine}", case.probes[RUN]
    if found.answer is Answer.NO:
        yield Opinion("fail", f"{here}: {found.reason}", found.cure or probe.LET_PASS)
    elif found.answer is Answer.UNKNOWN:
        yield Opinion("unknown", f"{here}: could not tell: {found.reason}", "ask again")
    else:
        yield Opinion("ok", f"{here}{_lacking(case.facts.release)}")


def _lacking(release: str) -> str:
    """The features that this kernel is too old for; "" if `release` has no version."""
    version = features.kernel_version(release)
    later = [each for each in features.FEATURES if (0, 0) < version < each.since]
    return "".join(f"; {each.version} is needed {each.gives}" for each in later)


def _candidate(case: Case, backend: str, works: str, cure: str) -> Opinion:
    found = case.probes[backend]
    if found.answer is Answer.YES:
        return Opinion("ok", f"yes: {works}")
    told = f"{found.answer.value}: {found.reason}"
    if backend not in case.wanted:
        return Opinion("ok", f"{told} (this service does not ask for it)")
    if found.answer is Answer.NO:
        return Opinion("warn", told, cure)
    return Opinion("unknown", told, found.cure or "ask again")


def ebpf(case: Case) -> Iterator[Opinion]:
    yield _candidate(case, EBPF, "programs and their maps load and attach", ebpf_cure(case))


def cbpf(case: Case) -> Iterator[Opinion]:
    cure = case.probes[CBPF].cure or GET_CBPF
    yield _candidate(case, CBPF, "classic programs attach; no privilege is needed", cure)


def migration(case: Case) -> Iterator[Opinion]:
    """Only the eBPF backend can migrate, so without eBPF the cure is that of eBPF."""
    if not case.has_tcp or EBPF not in case.wanted:
        return
    is_there = case.probes[EBPF].answer is Answer.YES
    cure = features.MIGRATE.cure if is_there else ebpf_cure(case)
    words = "the program selects the worker that gets a closing worker's queue"
    yield _opinion(case.probes[MIGRATE], words, cure)


def counting(case: Case) -> Iterator[Opinion]:
    """Whether connections can be counted. If not, least-conn reads the lengths of accept queues,
    and `status` shows no open connections."""
    if not case.has_tcp or EBPF not in case.wanted:
        return
    found = case.probes[COUNT]
    words = "the kernel counts the open connections of each worker"
    yield _opinion(found, words, found.cure or _COUNT_CURE)


def _opinion(found: Finding, words: str, cure: str) -> Opinion:
    """The opinion about the result of a probe. `words` describe what a yes means."""
    if found.answer is Answer.YES:
        return Opinion("ok", f"yes: {words}")
    if found.answer is Answer.NO:
        return Opinion("warn", f"no: {found.reason}", cure)
    return Opinion("unknown", f"could not tell: {found.reason}", found.cure or "ask again")


def policy(case: Case) -> Iterator[Opinion]:
    """The policy that `auto` becomes. A policy that ignores load is a warning, unless the service
    has UDP addresses or asks for a lesser backend: then `auto` never goes by load."""
    plan = known(case.plan, MOUNT_SYSFS)
    if not plan.became:
        return
    has_udp = any(bind.protocol == "udp" for bind in case.service.binds)
    if plan.policy.reads_load or has_udp or case.service.backend not in ("auto", EBPF):
        yield Opinion("ok", plan.became)
    else:
        yield Opinion("warn", plan.became, _count_cure(case))


def _count_cure(case: Case) -> str:
    """What would let `auto` select by load."""
    if case.probes[EBPF].answer is not Answer.YES:
        return ebpf_cure(case)
    counting = case.probes[COUNT]
    if counting.answer is not Answer.YES:
        return counting.cure or _COUNT_CURE
    return "give CAP_PERFMON too: without it the verifier refuses programs that compare workers"


def backend(case: Case) -> Iterator[Opinion]:
    candidate = known(case.plan, MOUNT_SYSFS).backends[0]
    found = f"{candidate.backend}; {candidate.reason}" if candidate.reason else candidate.backend
    if not candidate.fallback:
        yield Opinion("ok", found)
    elif case.service.strict:
        yield Opinion("fail", f"{found}, and --strict", f"{_backend_cure(case)}, or drop --strict")
    else:
        yield Opinion("warn", found, _backend_cure(case))


def draining(case: Case) -> Iterator[Opinion]:
    candidate = known(case.plan, MOUNT_SYSFS).backends[0]
    if candidate.backend == KERNEL:
        cure = _backend_cure(case) if candidate.fallback else _STEERABLE
        yield Opinion("warn", NO_EXCLUSION, cure)
    else:
        yield Opinion(
            "ok", "a draining worker gets no new connections and exits when it has finished its own"
        )
    if any(bind.protocol == "udp" for bind in case.service.binds):
        yield Opinion("ok", DATAGRAMS_LOST)
    if candidate.backend == KERNEL:
        for note in anchors.notes(case.service.binds, {}):
            yield Opinion("warn", note.found, note.cure)


def spares(case: Case) -> Iterator[Opinion]:
    candidate, number = known(case.plan, MOUNT_SYSFS).backends[0], case.service.spares
    if candidate.backend == KERNEL and number:
        yield Opinion("warn", NO_SPARES, _backend_cure(case) if candidate.fallback else _STEERABLE)
    elif candidate.backend == KERNEL:
        yield Opinion("ok", "0: the kernel's hash would select them as well")
    elif number:
        yield Opinion("ok", f"{number}: ready to take the places of workers that fail")
    else:
        gain = "--spares 1 would have a ready one take its place, for the memory of one worker"
        yield Opinion("ok", f"0: a worker that fails is missing until another has started; {gain}")


def _backend_cure(case: Case) -> str:
    """How to get the policy or backend that the user wants."""
    wanted = case.service.backend
    if wanted not in ("auto", *case.policy.backends):
        return f"choose --backend auto, or a policy that runs on {wanted} (see `steer policies`)"
    is_classic = wanted == CBPF
    return (case.probes[CBPF].cure or GET_CBPF) if is_classic else ebpf_cure(case)
