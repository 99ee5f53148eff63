"""How servers end."""

from __future__ import annotations

import sys
from typing import NoReturn

from steer.child.api import Worker
from steer.config.service import Service

_SHARE = 0.9


def time_s(service: Service) -> float:
    """How long a server waits for open requests, if its options do not say. The rest of
    `graceful_timeout` is for the shutdown of the application."""
    return service.graceful_timeout * _SHARE


def fail(worker: Worker, service: Service, why: str) -> NoReturn:
    """End the worker, as its application has failed. Raises SystemExit."""
    print(f"steer: worker {worker.slot}: {service.app}: {why}", file=sys.stderr)
    raise SystemExit(1)
