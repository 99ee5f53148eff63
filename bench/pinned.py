"""The demo, with every worker pinned to a CPU, for the bench of locality to compare with."""

from __future__ import annotations

import os
import socket

from steer.child import demo
from steer.child.api import Worker


def by_hash(worker: Worker) -> None:
    _pin(worker)
    demo.serve(worker)


def by_incoming_cpu(worker: Worker) -> None:
    """As socket(7) has it for reuseport groups, honoured since Linux 6.2."""
    cpu = _pin(worker)
    for sock in worker.sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU, cpu)
    demo.serve(worker)


def _pin(worker: Worker) -> int:
    cpu = worker.cpus[worker.slot % len(worker.cpus)]
    os.sched_setaffinity(0, {cpu})
    return cpu
