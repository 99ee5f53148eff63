"""The command `run`."""

from __future__ import annotations

import os
import sys

from steer.cli import entry
from steer.cli.options import Given, Source


def perform(given: Given) -> None:
    """Run a service until it ends.

    Raises:
        SteerError: the service cannot be started.
        SystemExit: the service has ended; with its exit status.
    """
    options = dict(given.options)
    check_config, print_config = options.pop("check_config"), options.pop("print_config")
    read = Source(options, given.command)
    service = read()
    if print_config:
        from steer.config.sources import as_toml

        print(as_toml(service))
    from steer.controller import run
    from steer.linux import log
    from steer.loader import find

    if check_config:
        find.prepare(service.policy)
    if check_config or print_config:
        return
    logger = log.Log(service.log_level, service.log_format)
    entry.logs_to(logger)
    if service.adopts:
        from steer.attach import adopted

        sys.exit(adopted.run(service, os.environ, logger, read))
    sys.exit(run.run(service, os.environ, logger, read))
