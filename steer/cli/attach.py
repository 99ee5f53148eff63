"""The commands `attach` and `detach`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def attach(
    where: str,
    policy: str,
    name: str | None,
    weights: str | None,
    params: Sequence[str],
    control_socket: str | None,
    replace: bool,
    netns: str | None,
    log_level: str,
    log_format: str,
) -> None:
    """Steer listeners of a server that runs, until that is ended.

    Raises:
        SteerError: they cannot be steered.
        SystemExit: with the exit status.
    """
    from steer.attach import service as attached
    from steer.attach.target import Target, bind_of
    from steer.cli import entry
    from steer.config.planning import plan
    from steer.config.service import Service
    from steer.config.sources import changed
    from steer.errors import ConfigError
    from steer.linux import log, topology
    from steer.linux import netns as namespaces
    from steer.loader import find, probe

    if netns is not None:
        namespaces.enter(namespaces.path_of(netns))
    act = f"attach to {where}"
    target = Target(bind_of(where), replace)
    label = target.bind.label.removeprefix("tcp ")
    asked = {
        "bind": [label],
        "policy": policy,
        "params": list(params),
        "weights": weights.split(",") if weights else [],
        "workers": len(target.listeners),
        "backend": "ebpf",
        "strict": True,
        "name": name or target.name,
        "control_socket": control_socket,
        "log_level": log_level,
        "log_format": log_format,
    }
    service = changed(Service(), {key: value for key, value in asked.items() if value}, act)
    logger = log.Log(service.log_level, service.log_format)
    entry.logs_to(logger)
    chosen = find.prepare(service.policy)
    if chosen.source is None and not chosen.candidates:
        raise ConfigError(act, "without steer the kernel's hash selects anyway")
    decided = plan(service, topology.read(), probe.findings_before_start(), chosen)
    sys.exit(attached.run(decided, target, os.environ, logger))


def detach(name: str | None, as_json: bool, control_socket: str | None) -> None:
    """Leave listeners to the kernel again; return when that is done."""
    from steer.cli import output
    from steer.control import client

    path = _located(name, control_socket)
    called = client.status(path).services[0].name
    with output.progress(f"detach {called}") as progress:
        client.stop(path, False, progress)
    if as_json:
        output.as_json({"detached": called})
    else:
        print(f"detached {called}")


def _located(wanted: str | None, control_socket: str | None) -> Path:
    """The control socket of an attached group, by its name or its address.

    Raises:
        ControlError: there is none, or it is of a service of steer's own.
    """
    from steer.control import client, find
    from steer.errors import ControlError

    name = _name_at(wanted) if wanted and ":" in wanted else wanted
    path = find.locate(name, control_socket, os.environ)
    service = client.status(path).services[0]
    if not service.attached:
        cause = "steer started its workers itself"
        raise ControlError(f"detach {service.name}", cause, f"`steer stop {service.name}` ends it")
    return path


def _name_at(where: str) -> str:
    """The name of the service at an address. Raises NotRunning: none is there."""
    import msgspec

    from steer.attach import there
    from steer.config import address
    from steer.errors import NotRunning

    bind = address.parse(where)
    binds = [bind]
    if where.startswith((":", "*:")):
        binds.append(msgspec.structs.replace(bind, address="::"))
    for each in binds:
        for service in there.services_at(each, os.environ):
            return service.name
    raise NotRunning(f"detach {where}", "no service steers it", "see `steer status`")
