"""The command `check`."""

from __future__ import annotations

import os

from steer.cli import output
from steer.config import adopting
from steer.config.service import Service
from steer.controller import dry_run
from steer.controller.dry_run import DryRun
from steer.linux import topology
from steer.loader import find, probe


def perform(service: Service, as_json: bool) -> None:
    """Print what `run` would do, and why. Raises SteerError: it could not be run."""
    chosen = find.find(service.policy)
    decided = adopting.shown(service, topology.read(), probe.findings(), chosen)
    found = dry_run.dry_run(decided, os.environ)
    if as_json:
        whole = {"memory_bytes": found.memory_bytes, "notes": found.notes}
        output.as_json({**found.plan.describe(), **whole})
    else:
        _print(found)


def _print(found: DryRun) -> None:
    for number, step in enumerate(found.plan.steps(), 1):
        reason = f"  ({step.reason})" if step.reason else ""
        print(f"{number}. {step.act.value} {step.object}{reason}")
    if found.memory_bytes:
        print(f"memory: {found.memory_bytes / 1e6:.1f} MB in the kernel, for maps")
    for note in found.notes:
        print(f"note: {note}")
