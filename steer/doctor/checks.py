"""What this machine can do for a service, what is missing, and how to get it.

`look` makes a `Case`; then the checks judge it. A check is a pure function from a `Case` to
its opinions. A check that does not apply returns none. CHECKS lists all checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steer.config.service import Service
from steer.doctor import fallback, installed, packets, privileges, settings
from steer.doctor.case import Case, Check, CouldNotTell, Finding, Opinion
from steer.doctor.look import look


def examine(service: Service) -> list[Finding]:
    """The findings about running a service here. This changes nothing."""
    return judge(look(service))


def judge(case: Case) -> list[Finding]:
    """The findings of all checks, in their order. Pure."""
    return [
        Finding(topic, *opinion)
        for topic, check in CHECKS.items()
        for opinion in _opinions(check, case)
    ]


def _opinions(check: Check, case: Case) -> Sequence[Opinion]:
    try:
        return tuple(check(case))
    except CouldNotTell as error:
        return (error.opinion,)


CHECKS: Mapping[str, Check] = {
    "kernel": fallback.kernel,
    "cpus": packets.pinned_cpus,
    "privileges": privileges.held,
    "unprivileged-bpf": privileges.unprivileged_bpf,
    "confinement": privileges.confinement,
    "libbpf": installed.libbpf,
    "bcc": installed.bcc,
    "ebpf": fallback.ebpf,
    "migration": fallback.migration,
    "counting": fallback.counting,
    "cbpf": fallback.cbpf,
    "jit": settings.jit,
    "ports": privileges.ports,
    "socket-options": privileges.socket_options,
    "somaxconn": settings.somaxconn,
    "syncookies": settings.syncookies,
    "tcp-migrate-req": settings.migrate_req,
    "files": settings.files,
    "run-directory": settings.places,
    "workers": privileges.workers,
    "receive-queues": packets.receive_queues,
    "draining": fallback.draining,
    "spares": fallback.spares,
    "policy": fallback.policy,
    "backend": fallback.backend,
}
"""The checks by topic, in the order of the output. Keep the topics: scripts rely on them."""
