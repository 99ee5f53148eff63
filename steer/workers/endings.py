"""The error for a worker that ended without being told to."""

from __future__ import annotations

from steer.config import servers
from steer.errors import WorkersFailed
from steer.linux import fork
from steer.workers.process import WorkerProcess


def why(gone: WorkerProcess, status: int | None, *, has_served: bool) -> WorkersFailed:
    """Why a worker ended, with the cure if it is known.

    Args:
        status: see `process.how_it_ended`.
        has_served: whether the worker was ready before. Then its command is not at fault.
    """
    words = gone.last_words
    how, cure = fork.how_it_ended(status), ""
    if not has_served:
        service = gone.launch.service
        why_so, cure = servers.why_it_ended(service.command, status, words, service.adopts)
        how = f"{how}: {why_so}" if why_so else how
    return WorkersFailed("start workers", how, cure, detail=words)
