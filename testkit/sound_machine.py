"""A machine where all is well, as the doctor sees it, and what may be otherwise."""

from __future__ import annotations

import errno
from pathlib import Path

from steer import features
from steer.config.service import Service
from steer.doctor.case import COUNT, MIGRATE, RUN
from steer.doctor.facts import CAPABILITIES, Compiler, Facts, Place
from steer.features import Answer
from steer.linux.nic import Interface
from steer.policy.builtin import CBPF, EBPF
from steer.policy.cpus import Topology

LO = Interface("lo", None, None, (), ((),), "same-host clients arrive on the CPU they run on")
CARD = Interface("eth0", "ixgbe", 4, irq_cpus=(0, 1, 2, 3), rps=((), (), (), ()))
GOOD = Facts(
    release="6.1.0",
    machine="x86_64",
    uid=0,
    capabilities=frozenset(CAPABILITIES),
    user_namespace=False,
    seccomp=False,
    lockdown="none",
    profile="unconfined",
    sysctls={
        "kernel.unprivileged_bpf_disabled": 2,
        "net.core.bpf_jit_enable": 1,
        "net.core.somaxconn": 4096,
        "net.ipv4.ip_unprivileged_port_start": 1024,
        "net.ipv4.tcp_migrate_req": 0,
        "net.ipv4.tcp_syncookies": 1,
    },
    cpu_quota=None,
    memlock_bytes=None,
    files=(1024, 1048576),
    libbpf="1.1",
    bcc=Compiler("0.26.0", "/usr/bin/python3"),
    places=(Place(Path("/run/steer"), ""),),
    interfaces=(LO, CARD),
)
PROBES = {name: features.Finding(Answer.YES) for name in (RUN, EBPF, CBPF, MIGRATE, COUNT)}
EPERM = errno.EPERM
REFUSED = features.Finding(Answer.NO, "create BPF map steer_sockets: EPERM", errno=EPERM)
NO_BPF = {EBPF: REFUSED, MIGRATE: REFUSED}
FOUR = Topology(allowed=(0, 1, 2, 3), possible=(0, 1, 2, 3), node_of={})
SERVICE = Service(bind=("0.0.0.0:8080",), policy="cpu")
AUTO = Service(bind=("0.0.0.0:8080",))
REFUSES = features.Finding(Answer.NO, "attach: EPERM", errno=EPERM)
