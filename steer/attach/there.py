"""Which services steer an address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from steer.config.address import Bind
from steer.control import client, rundir
from steer.control.schema import Service
from steer.errors import ControlError
from steer.linux import netns


def services_at(bind: Bind, environment: Mapping[str, str]) -> Iterator[Service]:
    """Those of this user in this network namespace whose control sockets are in the usual
    directories."""
    here = netns.own()
    return (each for each in _services_of(bind, environment) if each.netns in (here, None))


def elsewhere(bind: Bind, environment: Mapping[str, str]) -> Iterator[Service]:
    """Those at the same address of other network namespaces."""
    here = netns.own()
    return (each for each in _services_of(bind, environment) if each.netns not in (here, None))


def cure(name: str, pid: int) -> str:
    """What to do instead of an attach where a service steers already."""
    return f"`steer policy {name} POLICY`, or `kill -USR2 {pid}` after an upgrade of steer"


def _services_of(bind: Bind, environment: Mapping[str, str]) -> Iterator[Service]:
    wanted = (bind.protocol, bind.address, bind.port)
    for path in rundir.find(environment):
        with suppress(ControlError):
            for each in client.status(path).services:
                if any(wanted == (b.protocol, b.address, b.port) for b in each.binds):
                    yield each
