"""The commands `attach` and `detach`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from steer.attach.beginning import Beginning
    from steer.config.service import Service


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
    from steer.attach import handover
    from steer.attach.beginning import Anew, Succession
    from steer.attach.binds import text_of
    from steer.attach.target import targets_at
    from steer.config.service import Service
    from steer.config.sources import changed
    from steer.control import taken
    from steer.linux import netns as namespaces

    if (handed := handover.received(os.environ)) is not None:
        _run(where, Succession(handed), handed.service)
    if netns is not None:
        namespaces.enter(namespaces.path_of(netns))
    targets = targets_at(where, replace)
    asked = {
        "bind": [text_of(each.bind) for each in targets],
        "policy": policy,
        "params": list(params),
        "weights": weights.split(",") if weights else [],
        "workers": sum(len(each.listeners) for each in targets),
        "backend": "ebpf",
        "strict": True,
        "name": name or taken.free_name(targets[0].name, os.environ),
        "control_socket": control_socket,
        "log_level": log_level,
        "log_format": log_format,
    }
    given = {key: value for key, value in asked.items() if value}
    _run(where, Anew(targets), changed(Service(), given, f"attach to {where}"))


def _run(where: str, beginning: Beginning, service: Service) -> NoReturn:
    """Steer the listeners of a server. Raises as `attach`."""
    from steer.attach import refusal
    from steer.attach import service as attached
    from steer.cli import entry
    from steer.config.planning import plan
    from steer.errors import ConfigError
    from steer.linux import log, topology
    from steer.loader import find, probe

    act = f"attach to {where}"
    refusal.of_kernel(act)
    logger = log.Log(service.log_level, service.log_format)
    entry.logs_to(logger)
    chosen = find.prepare(service.policy)
    if chosen.source is None and not chosen.candidates:
        raise ConfigError(act, "without steer the kernel's hash selects anyway")
    with refusal.of_fallbacks(act):
        decided = plan(service, topology.read(), probe.findings_before_start(), chosen)
        sys.exit(attached.run(decided, beginning, os.environ, logger))


def detach(name: str | None, netns: str | None, as_json: bool, control_socket: str | None) -> None:
    """Leave listeners to the kernel again; return when that is done."""
    from steer.cli import output
    from steer.control import client
    from steer.errors import NotRunning
    from steer.linux import netns as namespaces

    if netns is not None:
        namespaces.enter(namespaces.path_of(netns))
    try:
        path = _located(name, control_socket)
    except NotRunning:
        if name and ":" in name and _remove_leftover(name):
            _print_removed(name, as_json)
            return
        _refuse_killed(name)
        raise
    called = client.status(path).services[0].name
    with output.progress(f"detach {called}") as progress:
        client.stop(path, False, progress)
    if as_json:
        output.as_json({"detached": called})
    else:
        print(f"detached {called}")


def _remove_leftover(where: str) -> bool:
    """Remove what a killed attacher left at an address. Returns whether there was something."""
    from steer.attach import leftover
    from steer.attach.binds import named_by
    from steer.control import find

    found = [leftover.remove(bind, f"detach {where}") for bind in named_by(where)]
    find.remove_dead_sockets(os.environ)
    return any(found)


def _refuse_killed(name: str | None) -> None:
    """Raises NotRunning: the attacher of that name was killed. Its socket tells no address."""
    from steer.control import claim, rundir
    from steer.errors import NotRunning

    for path in rundir.find(os.environ, name):
        if path.stem == name and claim.is_dead(path):
            cure = "`steer detach ADDR:PORT` removes the program that it left"
            raise NotRunning(f"detach {name}", "its attacher was killed", cure)


def _print_removed(where: str, as_json: bool) -> None:
    from steer.cli import output

    if as_json:
        output.as_json({"detached": where})
    else:
        print(f"detached {where}: its attacher was killed, and had left its program there")


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
    from steer.attach import there
    from steer.attach.binds import named_by
    from steer.errors import NotRunning

    for each in named_by(where):
        for service in there.services_at(each, os.environ):
            return service.name
    for each in named_by(where):
        for service in there.elsewhere(each, os.environ):
            cause = f"no service steers it, but {service.name} does in another network namespace"
            raise NotRunning(f"detach {where}", cause, f"`steer detach {service.name}`")
    raise NotRunning(f"detach {where}", "no service steers it", "see `steer status`")
