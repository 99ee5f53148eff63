"""The command `status`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from typing import NoReturn

import msgspec

from steer.cli import output, tables
from steer.cli.options import words
from steer.control import client, find, schema
from steer.errors import NotRunning


class Query(msgspec.Struct, frozen=True):
    """The services that the user asks for, and how to print them.

    Args:
        name: the name of a service; None: all services, unless there is a control socket.
    """

    name: str | None = None
    as_json: bool = False
    watch: bool = False
    control_socket: str | None = None


def plain(arguments: Sequence[str]) -> Query | None:
    """Read simple arguments of `status`.

    Returns:
        The same as click; None if click has to parse them or report what is wrong.
    """
    flags = {"--json": "as_json", "--watch": "watch"}
    read = words(arguments, flags, {"--control-socket": "control_socket"})
    if read is None or len(read[0]) > 1:
        return None
    names, given = read
    return Query(names[0] if names else None, **given)


def perform(query: Query) -> None:
    """Print the status of services.

    Raises:
        ControlError
        NotRunning: no service has that name, or this user has no service.
    """
    if query.watch:
        _watch(query)
    found = _current(query)
    if query.as_json:
        output.as_json(found)
    else:
        output.tables(tables.of_status(found))
    if not (query.name or query.control_socket):
        find.remove_dead_sockets(os.environ)
    if found.services or found.orphaned:
        return
    others = find.of_others(os.environ) if found.others else ()
    if others:
        raise NotRunning("status", *find.none_of_ours(others))
    if not query.as_json:
        print("no service is running")


def _watch(query: Query) -> NoReturn:
    with closing(client.Connections()) as connections:
        if query.as_json:
            output.again(lambda: output.as_json(_current(query, connections)))
        output.watch(lambda: tables.of_status(_current(query, connections)))


def _current(query: Query, connections: client.Connections | None = None) -> schema.Status:
    if query.name or query.control_socket:
        path = find.locate(query.name, query.control_socket, os.environ, connections)
        return client.status(path, connections)
    return find.status_of_all(os.environ, connections)
