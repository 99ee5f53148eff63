"""The command `doctor`."""

from __future__ import annotations

import sys

from steer.cli import output
from steer.cli.tables import Table
from steer.config.service import Service
from steer.doctor import checks


def perform(service: Service, as_json: bool) -> None:
    """Print what this machine can do for a service.

    Raises:
        SystemExit: with status 1 if a check fails, else 0.
    """
    found = checks.examine(service)
    if as_json:
        output.as_json({"findings": found})
    else:
        rows = [(each.topic, each.verdict, each.found, each.cure) for each in found]
        columns = ("topic", "", "found", "what would help")
        output.tables([Table("", columns, rows, verdicts="")])
    sys.exit(any(each.verdict == "fail" for each in found))
