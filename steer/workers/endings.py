"""Why workers ended that nobody told to."""

from __future__ import annotations

from steer.config import servers
from steer.errors import WorkersFailed
from steer.linux import fork
from steer.workers.process import WorkerProcess


def why(gone: WorkerProcess, status: int | None, *, has_served: bool) -> WorkersFailed:
    """As an error, with what would help if that is known.

    Args:
        status: see `process.how_it_ended`.
        has_served: whether it was ready before; then it was started as it has to be.
    """
    words = gone.last_words
    how, cure = fork.how_it_ended(status), ""
    if not has_served:
        why_so, cure = servers.why_it_ended(gone.launch.service.command, status, words)
        how = f"{how}: {why_so}" if why_so else how
    return WorkersFailed("start workers", how, cure, detail=words)
